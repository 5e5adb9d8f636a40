"""Act with an exported agent: python act_with_onnx.py actor.onnx (it needs numpy and onnxruntime, nothing else)."""

import sys

import numpy as np
import onnxruntime

KINDS = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(bool)": bool}
session = onnxruntime.InferenceSession(sys.argv[1])
given = {entry.name: np.zeros(entry.shape, KINDS[entry.type]) for entry in session.get_inputs()}
outputs = [entry.name for entry in session.get_outputs()]
links = {name: name.removesuffix("_out") + "_in" for name in outputs if name.endswith("_out")}
rng = np.random.default_rng(0)
draw = {"normal": rng.standard_normal, "uniform": rng.random, "exponential": rng.standard_exponential}
drawn = {name: draw[name.split("_")[0]] for name in given if name.split("_")[0] in draw}
for step in range(5):  # your observations go into given["obs"] or given["obs_KEY"], a task's number into given["task"]
    given["is_first"][:] = step == 0
    given |= {name: of(given[name].shape, dtype=np.float32) for name, of in drawn.items()}
    found = dict(zip(outputs, session.run(None, given), strict=True))
    given |= {into: found[name] for name, into in links.items()}
    print(found["action"].tolist())
