"""Act with an exported agent: python act_with_onnx.py actor.onnx (it needs numpy and onnxruntime, nothing else)."""

import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
shapes = {entry.name: entry.shape for entry in session.get_inputs()}
outputs = [entry.name for entry in session.get_outputs()]
links = {name: name.removesuffix("_out") + "_in" for name in outputs if name.endswith("_out")}
state = {into: np.zeros(shapes[into], np.float32) for into in links.values()}
rng = np.random.default_rng(0)
draw = {"normal": rng.standard_normal, "uniform": rng.random, "exponential": rng.standard_exponential}
drawn = {name: draw[name.split("_")[0]] for name in shapes if name.split("_")[0] in draw}
for step in range(5):
    seen = {"obs": np.zeros(shapes["obs"], np.float32), "is_first": np.full(shapes["obs"][0], step == 0)}  # yours
    given = {**seen, **state, **{name: of(shapes[name], dtype=np.float32) for name, of in drawn.items()}}
    found = dict(zip(outputs, session.run(None, {name: given[name] for name in shapes}), strict=True))
    state = {into: found[name] for name, into in links.items()}
    print(found["action"].tolist())
