"""The engines a plan can be rendered for. A new one is its file and a row here."""

from rankwright.templates.engines.engine import Engine
from rankwright.templates.engines.sglang import SGLANG
from rankwright.templates.engines.trtllm import TRTLLM
from rankwright.templates.engines.vllm import VLLM

ENGINES: dict[str, Engine] = {"vllm": VLLM, "sglang": SGLANG, "trtllm": TRTLLM}
