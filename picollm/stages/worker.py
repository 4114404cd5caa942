from picollm.worker import Worker, launcher_lives, run  # noqa: F401  (shim, removed at integration)
