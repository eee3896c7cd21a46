"""Redact: no password in a log line, an artifact, an error or the ledger."""

import re

_IN_ADDRESS = re.compile(r"(://[^:/?#\s@]*:)([^\s]*)(@)")
_AS_KEYWORD = re.compile(r"((?:password|passwd|pwd)\s*=\s*)('[^']*'|[^\s&;]+)", re.IGNORECASE)


def redact(text: str) -> str:
    """``text`` without the passwords of any address or connection string in it."""
    return _AS_KEYWORD.sub(r"\1***", _IN_ADDRESS.sub(r"\1***\3", text))
