import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from worldloom.runs.compiling import drop_damaged_libraries


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF files are Linux's")
def test_libraries_that_were_cut_short_are_dropped_and_whole_ones_stay(tmp_path):
    library = next(Path(np.__file__).parent.rglob("*.so"))
    content = library.read_bytes()
    shutil.copy(library, tmp_path / "whole.so")
    (tmp_path / "sub").mkdir()
    kept = {"empty.so": 0, "header.so": 30, "half.so": len(content) // 2, "last.so": len(content) - 1}
    for name, size in kept.items():
        (tmp_path / "sub" / name).write_bytes(content[:size])
    dropped = drop_damaged_libraries(tmp_path)
    assert {path.name for path in dropped} == set(kept)
    assert [path.name for path in tmp_path.rglob("*.so")] == ["whole.so"]
    assert drop_damaged_libraries(tmp_path / "absent") == []
