"""What is free, and tensors on a spill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.errors import UsageError
from quantkit.machine import memory, room
from quantkit.machine.memory import SpillFile, free_memory


def test_what_is_said_counts_where_it_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_MEMORY", raising=False)
    free = free_memory()
    assert free > 0
    monkeypatch.setenv("QUANTKIT_MEMORY", "2MiB")
    assert free_memory() == 2 << 20
    monkeypatch.setenv("QUANTKIT_MEMORY", "4000TB")
    assert free_memory() < 1 << 50
    monkeypatch.setenv("QUANTKIT_MEMORY", "much")
    with pytest.raises(UsageError):
        free_memory()


def test_a_gpu_has_what_tensors_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch reserves and does not use is free; what its tensors have counts as said."""
    monkeypatch.delenv("QUANTKIT_MEMORY", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1300)
    assert free_memory("cuda") == 5300
    for said, left in (("4000", 3000), ("9000", 5300), ("500B", 0)):
        monkeypatch.setenv("QUANTKIT_MEMORY", said)
        assert free_memory("cuda") == left


def test_a_container_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_MEMORY", raising=False)
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\ninactive_file 500\n")
    assert free_memory() == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1500


def test_a_group_of_the_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost group, or one above it, may have least."""
    monkeypatch.delenv("QUANTKIT_MEMORY", raising=False)
    monkeypatch.setattr(room, "_CGROUP", tmp_path / "fs")
    monkeypatch.setattr(room, "_PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:memory:/lab/job\n1:cpu:/other\n0::/\n")
    inner, outer = (tmp_path / "fs" / "memory" / name for name in ("lab/job", "lab"))
    inner.mkdir(parents=True)
    for folder, limit, used, cached in ((outer, 5000, 1000, 0), (inner, 1 << 63, 900, 0)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"inactive_file 9\ntotal_inactive_file {cached}\n")
    assert free_memory() == 4000 and "group" in room.free().bound
    (inner / "memory.limit_in_bytes").write_text("1100\n")
    assert free_memory() == 200
    (inner / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert room.kills() == {"group": 3}


_ASK = "from quantkit.machine import room; f = room.free(); print(f.n_bytes, f.own, f.bound)"


@pytest.mark.parametrize("option", ["-v", "-d"])
def test_a_ulimit_counts(option: str) -> None:
    """As clusters set it: what the process has already is taken off."""
    kilobytes = 300_000
    done = subprocess.run(
        ["bash", "-c", f"ulimit {option} {kilobytes} && exec {sys.executable} -c '{_ASK}'"],
        capture_output=True,
        text=True,
        check=True,
    )
    n_bytes, own, bound = done.stdout.split(maxsplit=2)
    assert bound.strip() == f"by `ulimit {option}`" and int(own) > 1_000_000
    assert int(n_bytes) + int(own) == 1024 * kilobytes


@pytest.mark.parametrize("room", [0, 100, 1 << 20])
def test_a_shelf_gives_back_the_same_bits(tmp_path: Path, room: int) -> None:
    path = tmp_path / "new" / "spill"
    spill = SpillFile(path, room)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    tensors = {k: (100 * torch.randn(2, 3, 4)).to(k) for k in kinds}
    for key, tensor in tensors.items():
        assert spill.put(key, tensor)
    spill.put(torch.float32, tensors[torch.float32] + 1)  # in the place of the first
    for key, tensor in tensors.items():
        expected = tensor + 1 if key == torch.float32 else tensor
        assert torch.equal(spill.get(key), expected)
        assert spill.get(key).dtype == key
    assert path.exists() == (room < 1 << 20)
    if room == 0:
        assert path.stat().st_size == sum(t.nbytes for t in tensors.values())
    spill.clear()
    assert torch.float32 not in spill
    assert not path.exists()


def test_room_is_given_back(tmp_path: Path) -> None:
    """What is replaced or cleared does not count any longer."""
    spill = SpillFile(tmp_path / "spill", 100)
    for _ in range(3):
        for _ in range(3):
            spill.put("a", torch.zeros(25))
        spill.clear()
    assert not (tmp_path / "spill").exists()
    spill.put("b", torch.zeros(25))
    spill.put("c", torch.ones(25))
    assert (tmp_path / "spill").stat().st_size == 100
    assert torch.equal(spill.get("c"), torch.ones(25))


def test_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = SpillFile(tmp_path / "spill", 0)
    assert spill.put("a", torch.zeros(4))
    monkeypatch.setattr(memory, "_DISK_LEFT", 1 << 62)
    assert not spill.put("b", torch.zeros(4))
    assert "b" not in spill
    assert spill.put("a", torch.ones(4))  # has its place already
    assert torch.equal(spill.get("a"), torch.ones(4))
    assert not spill.put("a", torch.ones(5))
    assert "a" not in spill
