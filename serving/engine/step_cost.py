"""What a step that computes prompt tokens costs, fitted continuously to the engine's own steps.

    seconds = step_s  +  tokens x token_s  +  (sum over tokens of the tokens before each) x position_s
              fixed      the products         attention

The fit is a least-squares one of relative errors, so that a step held up by something else, which is only ever too
long, counts little; old steps fade. Steps of one size at one place tell of one sum and nothing of its parts: those
lean towards the proportions that a small model has on a CPU, however fast or slow the machine is.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_FADING = 0.97
"""Of all former steps' weight with each new one: about the last 30 steps count."""
_STIFFNESS = 0.02
"""Of the assumed proportions, in steps: so many exact observations would say as much."""
_LEAST_PART = 0.05
"""No part is less than this much of what is assumed of it: a negative one would be nonsense."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """See the module's docstring. The defaults are those of a model of 135M parameters on two cores."""

    step_s: float = 0.03
    token_s: float = 1.5e-3
    position_s: float = 6e-7

    def seconds(self, num_tokens: int, first_token: int) -> float:
        """Time of one step over `num_tokens` that follow `first_token` others."""
        return self.step_s + self.token_s * num_tokens + self.position_s * num_attended(num_tokens, first_token)

    def tokens_per_s(self, step_tokens: int) -> float:
        """Speed at the beginning of a prompt, in steps of `step_tokens`."""
        return 1 / (self.token_s + self.step_s / step_tokens)


class StepCostFit:
    """Takes in steps; `cost` is what they say. Belongs to the step loop, but anybody may read `cost`."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self.is_measured = False
        self._products: npt.NDArray[np.float64] = np.zeros((3, 3))
        self._targets: npt.NDArray[np.float64] = np.zeros(3)

    def __repr__(self) -> str:
        return f"<StepCostFit {self.cost}>"

    def note(self, num_tokens: int, attended: float, seconds: float) -> None:
        """A step over `num_tokens`, which attended to `attended` earlier ones in all, took `seconds`."""
        row = np.array([1.0, num_tokens, attended]) / seconds
        self._products = _FADING * self._products + np.outer(row, row)
        self._targets = _FADING * self._targets + row
        self.cost = self._solve()
        self.is_measured = True

    def _solve(self) -> StepCost:
        default = StepCost()
        assumed = self._scaled(np.array([default.step_s, default.token_s, default.position_s]))
        # In units of what is assumed, which is then three ones.
        products = self._products * np.outer(assumed, assumed) + _STIFFNESS * np.eye(3)
        parts = np.linalg.solve(products, self._targets * assumed + _STIFFNESS)
        fitted = self._scaled(assumed * np.maximum(parts, _LEAST_PART))
        return StepCost(*(float(part) for part in fitted))

    def _scaled(self, parts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """In the same proportions, as large as the steps say."""
        return parts * float((self._targets @ parts) / (parts @ self._products @ parts))


def num_attended(num_tokens: int, first_token: int) -> float:
    """Earlier tokens that `num_tokens` consecutive ones attend to, summed over them."""
    return num_tokens * (first_token + num_tokens / 2)
