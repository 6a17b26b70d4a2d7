"""One row of the kit, in this process.

    python -m tests.gpu.kit_row MODULE:FUNCTION cpu|cuda FOLDER OUT.json

OUT.json says what was seen, or the first line of what the function raised.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path


def main() -> int:
    function, device, folder, out = sys.argv[1:]
    module, _, name = function.partition(":")
    said: dict[str, str] = {}
    try:
        said["seen"] = getattr(importlib.import_module(module), name)(device, Path(folder))
    except Exception as error:  # reported, whatever it is
        traceback.print_exc()
        said["error"] = "".join(traceback.format_exception_only(error)).splitlines()[0]
    Path(out).write_text(json.dumps(said))
    return "error" in said


if __name__ == "__main__":
    sys.exit(main())
