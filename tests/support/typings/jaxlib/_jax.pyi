"""What a type checker should know of jaxlib's extension module, which ships without stubs."""

from typing import Any

class Device:
    id: int
    platform: str
    device_kind: str
    process_index: int
    def memory_stats(self) -> dict[str, int] | None: ...

def __getattr__(name: str) -> Any: ...
