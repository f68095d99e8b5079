"""A launch as a Slurm job: the rendered script is submitted, asked after, and told to drain.

Everything goes through Slurm's own programs and the job's folder, so that it works from any login
node: that node needs neither torch nor a GPU, only `sbatch` and a file system that nodes share.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rankwright.executor.backends.slurm_offer import check_offer
from rankwright.executor.backends.tools import ToolError, check_tool, require, run_tool
from rankwright.executor.launch_record import LaunchRecord, SlurmPlace, make_record
from rankwright.executor.launch_state import LaunchState, Phase, ask_server, phase_of
from rankwright.executor.log_tail import LogTail
from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.options import SlurmOptions, parse_options
from rankwright.templates.render import render
from rankwright.templates.slurm_job import SLURM_FILE

INSTALL = (
    "run this on a login node, or install Slurm's client programs (Debian: `apt install "
    "slurm-client`) with the cluster's slurm.conf"
)
# Where the script puts the folder of each job unless `log_dir` says otherwise.
_LOGS = "rankwright-logs"
_READY = re.compile(r"rankwright: ready in \S+ s: .* on (http://\S+)")
_ENDED = re.compile(r"rankwright: ended with status (\d+)")
# slurm.h, job states: what each means to someone who waits for a server.
_PHASES: dict[str, Phase] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "SUSPENDED": "queued",
    "STOPPED": "queued",
    "CONFIGURING": "starting",
    "RUNNING": "starting",
    "COMPLETING": "stopping",
    "SIGNALING": "stopping",
    "STAGE_OUT": "stopping",
    "COMPLETED": "ended",
    "CANCELLED": "ended",
}


def submit(plan: OwnPlan, folder: Path, settings: Mapping[str, object]) -> "SlurmLaunch":
    """Render `plan` into `folder` and submit it.

    Args:
        plan: What to run.
        folder: Of the job, on a file system that its nodes share; made if missing.
        settings: Options of the target (`templates/options.py`).

    Raises:
        MissingToolError: There is no `sbatch`.
        ValueError: An option is not valid, or Slurm does not have what the plan asks for.
        ToolError: Slurm refused.
    """
    require("sbatch", INSTALL)
    options = parse_options(SlurmOptions, "slurm", dict(settings))
    check_offer(plan, options)
    folder = folder.resolve()
    render(plan, "slurm", folder, **settings)
    # "JOB" or "JOB;CLUSTER"
    job = check_tool(["sbatch", "--parsable", SLURM_FILE], cwd=folder).strip().partition(";")[0]
    logs = folder / _LOGS if options.log_dir is None else Path(options.log_dir)
    place = SlurmPlace(job=job, folder=folder, run_dir=logs / job)
    return SlurmLaunch(make_record(plan, "slurm", place))


@dataclass
class SlurmLaunch:
    """A job that was submitted."""

    record: LaunchRecord
    _logs: LogTail = field(init=False)

    def __post_init__(self) -> None:
        """Find the logs."""
        place = self._place
        self._logs = LogTail(
            lambda: [*place.folder.glob(f"*-{place.job}.out"), *_node_logs(place.run_dir)]
        )

    @property
    def _place(self) -> SlurmPlace:
        assert isinstance(self.record.place, SlurmPlace)
        return self.record.place

    def look(self) -> LaunchState:
        """Return how the job does.

        Raises:
            ToolError: Slurm does not answer.
        """
        done = run_tool(["scontrol", "show", "job", "--oneliner", self._place.job])
        if done.returncode:
            if "Invalid job id" in done.stderr:  # it ended so long ago that Slurm has forgotten it
                return self._last_words()
            raise ToolError(f"`scontrol` failed: {' '.join(done.stderr.split())}")
        fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", done.stdout.splitlines()[0]))
        state = fields.get("JobState", "UNKNOWN")
        phase: Phase = _PHASES.get(state, "failed")
        if phase == "queued":
            return LaunchState(phase, _why_queued(state, fields))
        if state == "RUNNING":
            return self._running(fields)
        if phase == "failed":
            code = fields.get("ExitCode", "?").partition(":")[0]
            return LaunchState(phase, f"{state}, exit code {code}: {self._last_line()}")
        return LaunchState(phase, "cancelled" if state == "CANCELLED" else "", url=self._url())

    def log_lines(self) -> list[str]:
        """Return what the job and its launchers have printed since the last call."""
        return self._logs.lines()

    def stop(self, *, drain: bool) -> None:
        """Begin to end the job; the batch script hands a TERM to the launcher that serves.

        Raises:
            ToolError: Slurm refused.
        """
        running = self.look().phase in ("starting", "loading", "ready")
        # A plain scancel gives KillWait seconds to everything at once and waits for no request.
        how = ["--batch", "--signal=TERM"] if drain and running else []
        check_tool(["scancel", *how, self._place.job])

    def close(self) -> None:
        """Nothing is held open."""

    def _running(self, fields: Mapping[str, str]) -> LaunchState:
        where = f"on {fields.get('NodeList', '?')}"
        url = self._url()
        server = None if url is None else ask_server(url)
        if server is not None:
            detail = where if server.status in ("ok", "starting") else server.status
            return LaunchState(phase_of(server), detail, url, server)
        logs = "".join(path.read_text(errors="replace") for path in _node_logs(self._place.run_dir))
        if _READY.search(logs):
            return LaunchState("ready", f"{where}; its port is closed to this machine", url)
        return LaunchState("loading" if "rankwright: starting" in logs else "starting", where, url)

    def _url(self) -> str | None:
        try:
            return (self._place.run_dir / "url").read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def _last_line(self) -> str:
        """Return the last thing that a launcher said, which is the cause where one failed."""
        said = ""
        for path in _node_logs(self._place.run_dir):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line]
            ours = [line for line in lines if "rankwright: rank" in line] or lines[-1:]
            said = ours[-1] if ours and (not said or "rankwright: rank" in ours[-1]) else said
        return said or f"see {self._place.folder}"

    def _last_words(self) -> LaunchState:
        for output in self._place.folder.glob(f"*-{self._place.job}.out"):
            codes = _ENDED.findall(output.read_text(errors="replace"))
            if codes:
                phase: Phase = "ended" if codes[-1] == "0" else "failed"
                return LaunchState(phase, f"exit code {codes[-1]}")
        return LaunchState("ended", "Slurm no longer knows the job")


def _node_logs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("node-*.log"))


def _why_queued(state: str, fields: Mapping[str, str]) -> str:
    reason = fields.get("Reason", "None")
    words = [] if reason == "None" else [reason]
    if state != "PENDING":
        words.insert(0, state.lower())
    start = fields.get("StartTime", "Unknown")
    if start != "Unknown":
        words.append(f"expected to start {start}")
    return ", ".join(words)
