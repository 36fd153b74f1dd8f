"""Losses of our trainer and two peers, each on several layouts from one seed; `make curves`.

    python -m bench.curves [--steps 100]

Every run trains a GPT of 4 layers of 128 channels (torchtitan: its Llama, which has no dropout) in
float32 with hidden dropout 0.1 on the bytes of a file of Python's standard library. The global
batch of each step is the same on every layout of a trainer; what differs is how its ranks share it.
The result is docs/figures/curves.json, from which `make figures` draws.
"""

import argparse
import json
import sys
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path

from bench.run import ROOT, machine, make_visit
from bench.sides import SIDES, Visit
from bench.workload import Workload

OUTPUT = ROOT / "docs" / "figures" / "curves.json"
_TEXT = "_pydecimal.py"
_SHAPE = Workload(
    precision="fp32",
    dropout=0.1,
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    seq_length=128,
    vocab_size=512,
    global_batch_size=8,
    text=str(Path(sysconfig.get_path("stdlib"), _TEXT)),
)
_OF_ALL = ("tp1", "tp2", "tp2+sp", "tp4+sp", "dp2", "tp2+sp+dp2")
_LAYOUTS = {"ours": (*_OF_ALL, "cp2", "pp2"), "megatron": _OF_ALL, "titan": _OF_ALL}
_LIMIT_S = 900.0  # of a run


def main() -> int:
    """Train all and write the losses; the exit code is 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sides", nargs="*", default=list(_LAYOUTS))
    arguments = parser.parse_args()
    result = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"curves": []}
    kept = [curve for curve in result["curves"] if curve["side"] not in arguments.sides]
    result = {"machine": machine(), "workload": {**asdict(_SHAPE), "text": _TEXT}, "curves": kept}
    failed = False
    for side in (side for side in SIDES if side.key in arguments.sides):
        for layout in _LAYOUTS[side.key]:
            rows = 2 if layout == "pp2" else 0  # stages need several micro-batches
            visit = Visit("curves", side, replace(_SHAPE, layout=layout, micro_batch_size=rows))
            found = make_visit(visit, [f"--warmup={arguments.steps}", "--steps=0"], _LIMIT_S)
            failed |= "error" in found
            last = found.get("error") or f"{found['losses'][-1]:.6f}"
            sys.stdout.write(f"{side.key} {layout}: {last}\n")
            sys.stdout.flush()
            curve = {"side": side.key, "layout": layout, "losses": found.get("losses", [])}
            result["curves"].append(curve)
            OUTPUT.parent.mkdir(exist_ok=True)
            OUTPUT.write_text(json.dumps(result) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
