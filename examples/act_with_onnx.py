"""Act with an exported agent: python act_with_onnx.py actor.onnx (it needs numpy and onnxruntime, nothing else)."""

import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
kind = {f"tensor({name})": name for name in ("uint8", "int32", "int64", "bool")} | {"tensor(float)": "float32"}
given = {entry.name: np.zeros(entry.shape, kind[entry.type]) for entry in session.get_inputs()}
outputs = [entry.name for entry in session.get_outputs()]
links = {name: name.removesuffix("_out") + "_in" for name in outputs if name.endswith("_out")}
rng = np.random.default_rng(0)
draw = {"normal": rng.standard_normal, "uniform": rng.random, "exponential": rng.standard_exponential}
drawn = {name: draw[name.split("_")[0]] for name in given if name.split("_")[0] in draw}
for step in range(5):  # your observations go into given["obs"] or given["obs_KEY"], a task's number into given["task"]
    if "is_first" in given:
        given["is_first"][:] = step == 0
    given |= {name: of(given[name].shape, dtype=np.float32) for name, of in drawn.items()}
    found = dict(zip(outputs, session.run(None, given), strict=True))
    given |= {into: found[name] for name, into in links.items()}
    print(found["action"].tolist())
