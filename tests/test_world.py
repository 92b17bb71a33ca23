from __future__ import annotations

import os

import pytest

from skinsynth.world import place


@pytest.mark.parametrize(("nodes", "first"), [("gpu7", "gpu7"), ("a100-[003-005,011],v100-2", "a100-003"), ("login,node[1-2]", "login")])
def test_a_gang_finds_its_first_node_in_a_container_that_has_no_slurm(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    slurm = {"NTASKS": "8", "PROCID": "5", "LOCALID": "1", "JOB_ID": "77", "JOB_NODELIST": nodes, "RESTART_COUNT": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "/nowhere")
    world, variables = place()
    assert (world.rank, world.size, world.local_rank) == (5, 8, 1)
    assert variables["MASTER_ADDR"] == first
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert place()[1]["MASTER_PORT"] == variables["MASTER_PORT"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert place()[1]["MASTER_PORT"] != variables["MASTER_PORT"], "ranks of the last life may still hold it"
