"""Notes on the faults of a GPU, from facts as NVML gives them."""

from rankwright.topology.readers.health import health_notes

SOUND = {"index": 3, "slowdowns": None, "uncorrected": None, "ecc": None, "compute_mode": None}


def notes(**facts: object) -> list[str]:
    return health_notes({**SOUND, **facts})


def test_a_sound_gpu_and_a_silent_driver_give_no_note() -> None:
    assert notes() == []
    assert notes(slowdowns=0x1 | 0x4, uncorrected=0, ecc=[1, 1]) == []


def test_faults_are_named_with_their_remedy() -> None:
    assert notes(slowdowns=0x48) == [
        "GPU 3 is slowed down now: hardware slowdown, too hot (hardware thermal slowdown)"
    ]
    assert "counted 2 uncorrectable memory errors" in notes(uncorrected=2)[0]
    assert "lets no process compute" in notes(compute_mode=2)[0]
    assert notes(compute_mode=3) == []
    assert notes(ecc=[1, 0]) == ["GPU 3 turns ECC off at the next reboot"]
