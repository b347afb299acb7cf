"""Look at what happens inside a model, and change it: `capture`, `patch`, `output_grad`, `sow`.

A call goes to a stand-in of the model (`stand_in`) in which the selected modules (`selecting`)
carry marks. `probing` says what marks do, and `records` holds what they produce. `lifts` and
`lift_loops` say how each transformation carries both. `nnx.debug.find_nonfinite` (`nonfinite`) uses
the same machinery. The package is built on the core. While a probe is active, the core calls it
through `ambient.probe`.
"""

from nnx.probe.outputs import ProbeError, capture, output_grad, patch, sow

__all__ = ["ProbeError", "capture", "output_grad", "patch", "sow"]
