"""What keeps a GPU below its data sheet for good: a power limit, a clock limit, lost PCIe lanes.

What any reader found of them comes here, so that all readers lower the same rates.
"""

from dataclasses import dataclass

from rankwright.topology.readers.found import FoundGpu

# Limits a few watts below the default are set by vendors; the clocks hardly feel them.
_NOTABLE = 0.97
# Large matrix products draw all that a board may draw. Power goes with the cube of the clock while
# the voltage falls with it, and with the clock itself once it no longer can; the square is between
# the two. An A100 of 250 W then does 79 % of one of 400 W. An estimate, which `--measure` replaces.
_POWER_EXPONENT = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What is left of a GPU.

    Attributes:
        flops_share: Of the rates of its matrix units, 1 where nothing limits them.
        pcie_width: Lanes that work, None where the driver does not say.
        notes: What limits it, and the remedy.
    """

    flops_share: float
    pcie_width: int | None
    notes: tuple[str, ...]


def limits_of(gpu: FoundGpu, boost_hz: float | None) -> Limits:
    """Return what limits the GPU below the rates that it has at a clock of `boost_hz`.

    Args:
        gpu: As found.
        boost_hz: Clock of its data sheet; None: the highest that its driver names.
    """
    notes: list[str] = []
    share = 1.0
    limit, default = gpu.power_limit_w, gpu.default_power_limit_w
    if limit and default and limit < _NOTABLE * default:
        by_power = (limit / default) ** _POWER_EXPONENT
        share = min(share, by_power)
        notes.append(
            f"GPU {gpu.index} is limited to {limit:.0f} W of its {default:.0f} W: its clocks fall "
            f"under load, and its matrix products are taken at {100 * by_power:.0f} % (an "
            "estimate; --measure tells); `nvidia-smi -pl` sets the limit"
        )
    full = boost_hz or gpu.sm_clock_hz
    # The default of some boards is below what they run at; only a clock that was set is a limit.
    if gpu.set_clock_hz and gpu.default_clock_hz and full:
        by_clock = gpu.set_clock_hz / full
        if gpu.set_clock_hz < gpu.default_clock_hz and by_clock < _NOTABLE:
            share = min(share, by_clock)
            notes.append(
                f"GPU {gpu.index} has its clock set to {gpu.set_clock_hz / 1e6:.0f} MHz of "
                f"{full / 1e6:.0f}: its matrix products are taken at {100 * by_clock:.0f} %; "
                "`nvidia-smi -rac` resets it"
            )
    width = gpu.pcie_width
    if width and gpu.pcie_width_now and gpu.pcie_width_now < width:
        notes.append(
            f"GPU {gpu.index} has {gpu.pcie_width_now} of {width} PCIe lanes: check its seat, "
            "riser and slot"
        )
        width = gpu.pcie_width_now
    return Limits(share, width, tuple(notes))
