"""Downloading: the real client of the Hub against a server that speaks its protocol and can fail in every way."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hub_server import Corrupt, Cut, Etag, Hub, Stall, Status, WholeFile, parquet, shard

from picollm.data import download as download_module
from picollm.data import hub_errors
from picollm.data.dataset_record import ShardFile
from picollm.data.datasets import Dataset
from picollm.data.download import Download
from picollm.data.pinned import pin
from picollm.data.registry import source_named
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact, RemoteError

SET = source_named("hf:org/set")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(download_module, "GAIN_BYTES", 4096)


def name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def fetch(dataset: Dataset, *, jobs: int = 8) -> None:
    with Download(dataset, jobs=jobs) as download:
        assert download.wait(30), download.state()
        download.check()


def fetched(hub: Hub, *, shards: int = 3) -> Dataset:
    """Dataset `set`, complete."""
    dataset = pin("set", SET, shards=shards)
    fetch(dataset)
    return Dataset.open("set")


def texts(*numbers: int) -> list[str]:
    return [text for number in numbers for text in shard(number)]


# -- what is pinned ---------------------------------------------------------------------------------------------------


def test_the_record_is_there_before_any_shard_and_is_never_changed(hub: Hub) -> None:
    dataset = pin("set", SET, shards=2)
    record = (dataset.path / "dataset.json").read_bytes()
    assert sorted(path.name for path in dataset.path.iterdir()) == ["dataset.json"]
    assert [(file.name, file.split) for file in dataset.files] == [
        (name(0), "train"), (name(1), "train"), (name(5), "validation"),
    ]  # fmt: skip
    for file in dataset.files:
        data = hub.files[file.name]
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (file.rows, file.chars) == (None, None)
    assert dataset.source == {"hub": "org/set", "revision": hub.commit, "column": "text", "shards": 2}
    fetch(dataset)
    assert (dataset.path / "dataset.json").read_bytes() == record
    assert Dataset.open("set").sha256 == hashlib.sha256(record).hexdigest()


def test_what_came_is_what_the_hub_has(hub: Hub) -> None:
    dataset = fetched(hub)
    assert list(dataset.documents("train")) == texts(0, 1, 2)
    assert list(dataset.documents("validation")) == texts(5)
    assert (dataset.rows("train"), dataset.rows("validation")) == (120, 40)
    assert dataset.chars("train") == pytest.approx(sum(map(len, texts(0, 1, 2))), rel=0.25)
    assert dataset.verify() == []
    assert list((dataset.path / "parts").iterdir()) == []


def test_validation_of_the_registry_is_pinned_by_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from picollm.data.registry import HubSource

    source = HubSource("org/set", validation=name(3))
    dataset = pin("set", source, shards=3)
    assert [file.name for file in dataset.of("validation")] == [name(3)]
    with pytest.raises(ConfigError, match="no 4 training shards"):  # nothing behind the validation shard is trained on
        pin("other", source, shards=4)
    del hub.files[name(3)]
    with pytest.raises(ConfigError, match="3 parquet files"):  # and never another file in its place
        pin("other", source, shards=2)


def test_validation_is_what_says_so(hub: Hub) -> None:
    one = parquet(["a", "b"])
    hub.files = {f"data/{split}-{i}.parquet": one for split in ("train", "validation", "test") for i in range(2)}
    dataset = pin("set", SET, shards=2)
    assert [file.origin for file in dataset.of("validation")] == [
        "data/validation-0.parquet",
        "data/validation-1.parquet",
    ]
    assert [file.origin for file in dataset.of("train")] == ["data/train-0.parquet", "data/train-1.parquet"]
    hub.files = {"train/a.parquet": one, "train/b.parquet": one, "test/a.parquet": one}
    dataset = pin("same-names", SET, shards=2)
    assert [file.name for file in dataset.files] == ["000000.parquet", "000001.parquet", "000002.parquet"]
    assert [file.origin for file in dataset.of("validation")] == ["test/a.parquet"]


def test_configs_of_the_card(hub: Hub) -> None:
    one = parquet(["a", "b"])
    hub.files = {f"{folder}/{i}.parquet": one for folder in ("en", "de") for i in range(3)}
    hub.card = {
        "configs": [
            {"config_name": "english", "data_files": [{"split": "train", "path": "en/*"}]},
            {"config_name": "german", "data_files": "de/*.parquet"},
        ]
    }
    with pytest.raises(ConfigError, match="several datasets") as refused:
        pin("set", SET, shards=2)
    assert refused.value.cause == "its configs are english, german"
    for config, folder in (("english", "en"), ("german", "de"), ("de", "de")):
        dataset = pin(config, source_named(f"hf:org/set:{config}"), shards=2)
        assert [file.origin for file in dataset.files] == [f"{folder}/{i}.parquet" for i in range(3)]


def test_one_file_is_not_enough(hub: Hub) -> None:
    hub.files = {name(0): hub.files[name(0)]}
    with pytest.raises(ConfigError, match="`org/set` has 1 parquet files") as refused:
        pin("set", SET, shards=1)
    assert "picollm data import" in (refused.value.hint or "")


def test_another_column_is_read_and_a_missing_one_refused_before_anything_is_written(hub: Hub) -> None:
    hub.files = {name(i): parquet([f"row {i}", None], column="content", id=[1, 2]) for i in range(3)}
    with pytest.raises(ConfigError) as refused:
        pin("set", SET, shards=2)
    assert refused.value.cause == "it has no column `text`; its columns are: content, id"
    assert "--field" in (refused.value.hint or "")
    with pytest.raises(ConfigError, match="cannot be read as text") as refused:
        pin("set", SET, shards=2, field="id")
    assert refused.value.cause == "its column `id` holds int64, not text"
    assert not (Path(os.environ["PICOLLM_BASE_DIR"]) / "datasets").exists()
    fetch(pin("set", SET, shards=2, field="content"))
    assert list(Dataset.open("set").documents("train")) == ["row 0", "", "row 1", ""]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:org/nothing", "there is no dataset `org/nothing` on the Hub"),
        ("hf:org/set@v9", "`org/set` has no such revision"),
        ("hf:org/set:klingon", "`org/set` has 0 parquet files"),
    ],
)
def test_what_does_not_exist(hub: Hub, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pin("set", source_named(spec), shards=1)


def test_how_many_is_asked_with_what_there_is(hub: Hub) -> None:
    with pytest.raises(ConfigError) as refused:
        pin("set", SET)
    assert "it has 5 of 12." in (refused.value.cause or "")


# -- more shards, other data ------------------------------------------------------------------------------------------


def test_more_shards_are_a_new_identity_and_the_old_one_stays(hub: Hub) -> None:
    before = fetched(hub, shards=2)
    hub.requests.clear()
    larger = pin("set", SET, shards=4)
    assert larger.sha256 != before.sha256
    fetch(larger)
    assert hub.fetched(name(0)) == []  # what is here is shared
    now, then = Dataset.open("set"), Dataset.open("set", keep=[before.sha256])
    assert list(now.documents("train")) == texts(0, 1, 2, 3)
    assert (then.sha256, list(then.documents("train"))) == (before.sha256, texts(0, 1))
    assert list(now.documents("validation")) == list(then.documents("validation")) == texts(5)
    assert now.identities == {before.sha256, larger.sha256}
    assert pin("set", SET, shards=1).sha256 == larger.sha256  # fewer change nothing
    # The largest one is preferred to one that a run names only when the run names none.
    assert Dataset.open("set", keep=[before.sha256, now.sha256]).sha256 == now.sha256


def test_more_shards_come_from_the_same_commit(hub: Hub) -> None:
    fetched(hub, shards=2)
    first, hub.commit = hub.commit, "beef" + "0" * 36
    with pytest.raises(ConfigError, match="no such revision"):  # this server forgets; the Hub does not
        pin("set", SET, shards=3)
    hub.commit = first
    hub.files[name(0)] = parquet(["another"])
    with pytest.raises(RemoteError, match="is not what it was at the same commit"):
        pin("set", SET, shards=3)


def test_other_data_does_not_take_the_name(hub: Hub, tmp_path: Path) -> None:
    from picollm.data.importer import import_paths

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    import_paths("mine", [tmp_path / "a.jsonl"])
    fetched(hub, shards=2)
    for taken, arguments in (("mine", {}), ("set", {"field": "content"})):
        with pytest.raises(ConfigError, match=f"there is a dataset `{taken}` already"):
            pin(taken, SET, shards=2, **arguments)
    with pytest.raises(ConfigError, match="already"):
        pin("set", source_named("hf:org/set:en"), shards=2)


# -- faults of the server ---------------------------------------------------------------------------------------------


def test_busy_and_broken_servers_are_asked_again(hub: Hub) -> None:
    hub.listing_faults = [Status(503), Status(429, {"Retry-After": "0"})]
    hub.faults = {
        name(0): [Status(503), Status(429, {"Retry-After": "0"}), Status(500)],
        name(1): [Cut(5000), Cut(3000)],
        name(2): [Corrupt()],
        name(5): [Etag("0" * 64), WholeFile()],
    }
    dataset = fetched(hub)
    assert list(dataset.documents("train")) == texts(0, 1, 2)
    assert hub.fetched(name(1)) == ["", "bytes=5000-", "bytes=8000-"]
    wrong = (dataset.path / "quarantine" / name(2)).read_bytes()
    assert len(wrong) == len(hub.files[name(2)])
    assert wrong != hub.files[name(2)]


def test_a_hub_that_does_not_answer(hub: Hub) -> None:
    hub.listing_faults = [Status(503)] * 9
    with pytest.raises(RemoteError, match="the Hub did not answer for `org/set`") as refused:
        pin("set", SET, shards=1)
    assert refused.value.cause == "HTTP 503"
    hub.vanish_after = 0
    with pytest.raises(RemoteError, match="the Hub did not answer for `org/set`"):
        pin("set", SET, shards=1)


def test_retry_after_is_kept(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "FIRST_WAIT_S", 0.0)
    hub.faults = {name(0): [Status(429, {"Retry-After": "1"}), Status(429, {"RateLimit": '"resolvers";r=0;t=1'})]}
    arrived: list[float] = []
    monkeypatch.setattr(hub, "requests", _Clock(arrived, name(0)))
    fetched(hub, shards=1)
    first, second, third = arrived
    assert second - first >= 1
    assert third - second >= 1


class _Clock(list):
    """Notes when a file is asked for."""

    def __init__(self, arrived: list[float], path: str) -> None:
        super().__init__()
        self.arrived, self.path = arrived, f"/cdn/{path}?"

    def append(self, request: tuple[str, str, dict[str, str]]) -> None:
        if request[1].startswith(self.path) and not request[2].get("range", "").startswith("bytes=0-"):
            self.arrived.append(time.monotonic())


def test_a_server_that_sends_the_whole_file_instead_of_the_rest(hub: Hub) -> None:
    hub.faults = {name(0): [Cut(5000), WholeFile()]}
    assert list(fetched(hub, shards=1).documents("train")) == texts(0)


def test_a_server_that_stalls(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults = {name(0): [Stall(6000, seconds=1.5)]}
    assert list(fetched(hub, shards=1).documents("train")) == texts(0)
    assert hub.fetched(name(0)) == ["", "bytes=6000-"]


def test_a_file_that_never_comes_right(hub: Hub) -> None:
    hub.faults = {name(1): [Corrupt()] * 9}
    dataset = pin("set", SET, shards=3)
    with pytest.raises(RemoteError) as missing:
        fetch(dataset)
    assert missing.value.message == "1 of 4 files of dataset `set` are missing"
    assert missing.value.cause == (f"{name(1)}; `{name(1)}`: it came with another content than the Hub's record says")
    assert missing.value.hint == "what came is kept; go on with `picollm data download set`"
    assert len(hub.fetched(name(1))) == download_module.WRONG_TRIES
    assert not (dataset.path / name(1)).exists()
    hub.faults.clear()
    fetch(Dataset.open("set"))
    assert list(Dataset.open("set").documents("train")) == texts(0, 1, 2)


def test_a_file_that_is_gone_and_the_others_still_come(hub: Hub) -> None:
    dataset = pin("set", SET, shards=3)
    del hub.files[name(1)]
    with pytest.raises(RemoteError) as missing:
        fetch(dataset)
    assert missing.value.cause == f"{name(1)}; `{name(1)}`: the file is gone from the Hub"
    assert [file.name for file in dataset.missing()] == [name(1)]


def test_a_server_that_vanishes_half_way(hub: Hub) -> None:
    hub.vanish_after = 30_000
    dataset = pin("set", SET, shards=5)
    with pytest.raises(RemoteError, match="files of dataset `set` are missing") as missing:
        fetch(dataset, jobs=2)
    absent = [file.name for file in dataset.missing()]
    assert absent
    assert all(name in (missing.value.cause or "") for name in absent)
    hub.vanish_after = None
    fetch(Dataset.open("set"))
    assert Dataset.open("set").verify() == []


def test_no_access_ends_it_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    hub.token = "hf_rightrightright"
    dataset = pin("set", SET, shards=5)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(RemoteError, match="no access to `org/set`") as refused:
        fetch(dataset, jobs=1)
    assert "hf auth login" in (refused.value.hint or "")
    assert not any("/cdn/" in path for _, path, headers in hub.requests if "range" not in headers)


def test_the_token_goes_to_the_hub_alone_and_appears_nowhere(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_verysecretverysecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.token = secret
    hub.faults = {name(0): [Status(404)]}
    dataset = pin("set", SET, shards=2)
    with pytest.raises(RemoteError) as missing:
        fetch(dataset)
    said = f"{missing.value} {missing.value.cause} {missing.value.hint} {missing.value.__context__!r}"
    assert "HTTP" in said or "404" in said
    assert secret not in said
    assert "Signature" not in said
    for _, path, headers in hub.requests:
        assert headers.get("authorization") == (None if path.startswith("/cdn/") else f"Bearer {secret}")
    for path in dataset.path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    from picollm.data.hub_errors import _blotted

    assert _blotted(f"said {secret} at http://a/b?X-Amz-Signature=1 twice") == "said *** at http://a/b twice"
    assert _blotted("no answer of https://me:secret@a.b:8/c") == "no answer of https://a.b:8/c"


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_half_file_goes_on_and_what_is_here_is_not_asked_for(hub: Hub) -> None:
    dataset = pin("set", SET, shards=2)
    (dataset.path / "parts").mkdir()
    (dataset.path / "parts" / name(0)).write_bytes(hub.files[name(0)][:7000])
    (dataset.path / "parts" / name(1)).write_bytes(hub.files[name(1)] + b"more")
    fetch(dataset)
    assert hub.fetched(name(0))[-1] == "bytes=7000-"
    assert Dataset.open("set").verify() == []
    hub.requests.clear()
    assert pin("set", SET, shards=2).unverified() == []
    assert hub.requests == []


def test_a_half_file_of_other_bytes_is_found_out(hub: Hub) -> None:
    dataset = pin("set", SET, shards=1)
    (dataset.path / "parts").mkdir()
    (dataset.path / "parts" / name(0)).write_bytes(b"\0" * 7000)
    fetch(dataset)
    assert list(Dataset.open("set").documents("train")) == texts(0)
    assert (dataset.path / "quarantine" / name(0)).exists()


def test_a_damaged_shard_is_put_aside_and_fetched_again(hub: Hub) -> None:
    dataset = fetched(hub)
    os.truncate(dataset.path / name(1), 99)
    again = Dataset.open("set")
    assert [file.name for file in again.unverified()] == [name(1)]
    fetch(again)
    assert (dataset.path / "quarantine" / name(1)).stat().st_size == 99
    assert Dataset.open("set").verify() == []


def test_stopping_leaves_half_files_to_go_on_from(hub: Hub) -> None:
    hub.bytes_per_s = 100_000
    dataset = pin("set", SET, shards=5)
    with Download(dataset, jobs=1) as download:
        while download.state().bytes < 10_000:
            assert not download.wait(0.01)
    hub.bytes_per_s = None
    assert dataset.missing()
    assert any(path.stat().st_size for path in [*dataset.path.glob("*.parquet"), *(dataset.path / "parts").iterdir()])
    fetch(Dataset.open("set"))
    assert Dataset.open("set").verify() == []


def test_one_process_at_a_time(hub: Hub) -> None:
    dataset = pin("set", SET, shards=2)
    with Download(dataset), pytest.raises(HostError, match="in use by another process"), Download(Dataset.open("set")):
        pass


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = pin("set", SET, shards=2)
    monkeypatch.setattr(download_module, "disk_free", lambda path: 1000)
    with pytest.raises(HostError, match="not enough room for dataset `set`"), Download(dataset):
        pass
    assert hub.fetched(name(0)) == []


def test_a_disk_that_cannot_be_written(hub: Hub) -> None:
    dataset = pin("set", SET, shards=3)
    (dataset.path / "parts" / name(0)).mkdir(parents=True)
    with pytest.raises(HostError, match="cannot write"):
        fetch(dataset)


def test_waiting_for_one_file_while_others_come(hub: Hub) -> None:
    hub.bytes_per_s = 200_000
    dataset = pin("set", SET, shards=5)
    with Download(dataset, jobs=1) as download:
        assert list(dataset.stream("train", download.wait_for)) == texts(0, 1, 2, 3, 4)
    hub.bytes_per_s = None
    hub.faults = {name(2): [Corrupt()] * 9}
    other = pin("other", SET, shards=5)
    with Download(other) as download, pytest.raises(RemoteError, match=r"missing"):
        list(other.stream("train", download.wait_for))


# -- what readers see -------------------------------------------------------------------------------------------------


def test_an_incomplete_dataset_is_not_read(hub: Hub) -> None:
    dataset = pin("set", SET, shards=2)
    for read in (lambda: dataset.documents("train"), lambda: dataset.rows(), lambda: next(dataset.stream("train"))):
        with pytest.raises(MissingArtifact, match="dataset `set` is not complete") as missing:
            read()
        assert missing.value.hint == "finish it with `picollm data download set`"
    assert dataset.known_rows() is None
    assert dataset.chars() == sum(int(file.bytes * 2.5) for file in dataset.files)


def test_a_shard_that_was_changed_is_never_read_as_text(hub: Hub) -> None:
    path = fetched(hub).path / name(1)
    data, stat = path.read_bytes(), path.stat()
    for damaged, cause in (
        (data[:99], "it has 99 bytes, its record says"),
        (data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "its sha256 is not the recorded one"),
    ):
        path.write_bytes(damaged)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a careful vandal keeps the time
        for read in (lambda: Dataset.open("set").documents("train"), lambda: list(Dataset.open("set").stream("train"))):
            with pytest.raises(IntegrityError, match=name(1)) as found:
                read()
            assert cause in (found.value.cause or "")
            assert "picollm data download set" in (found.value.hint or "")
        assert [problem.partition(":")[0] for problem in Dataset.open("set").verify()] == [name(1)]
    path.write_bytes(data)
    assert list(Dataset.open("set").documents("train")) == texts(0, 1, 2)


def test_verify_finds_what_no_stamp_shows_and_has_it_fetched_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = fetched(hub)
    path = dataset.path / name(0)
    path.write_bytes(bytes(len(hub.files[name(0)])))
    dataset.verified._note(dataset.files[0], _stamp_of(path), dataset.counted(dataset.files[1]))  # a disk gone bad
    bad = Dataset.open("set")
    assert bad.unverified() == []
    assert bad.verify() == [f"{name(0)}: content changed (sha256 differs)"]
    fetch(Dataset.open("set"))
    assert Dataset.open("set").verify() == []


def _stamp_of(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def test_a_lost_or_torn_journal_costs_a_look(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = fetched(hub)
    journal = dataset.path / "verified.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(b'{"name": 3}\nnot json\n' + whole[: len(whole) // 2])
    assert Dataset.open("set").rows() == 160
    assert Dataset.open("set").unverified() == []
    journal.unlink()
    assert Dataset.open("set").known_rows() is None
    assert list(Dataset.open("set").documents("train")) == texts(0, 1, 2)


def test_the_order_of_arrival_changes_nothing(hub: Hub) -> None:
    first = fetched(hub)
    hub.faults = {name(0): [Status(503)] * 3}
    second = pin("again", SET, shards=3)
    fetch(second)
    assert list(second.documents("train")) == list(first.documents("train"))
    assert [file.sha256 for file in second.files] == [file.sha256 for file in first.files]


def test_a_shard_file_of_an_import_keeps_its_form() -> None:
    assert ShardFile("a.parquet", "train", 1, 2, 3, "ab").to_json() == {
        "name": "a.parquet", "split": "train", "rows": 1, "bytes": 2, "chars": 3, "sha256": "ab",
    }  # fmt: skip
