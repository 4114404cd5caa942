"""picollm: from raw text to a chat model that runs anywhere."""

__version__ = "0.1.0"
