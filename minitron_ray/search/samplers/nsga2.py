"""NSGA-II: a front of shapes, loss against a cost, instead of one best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from minitron_ray.search.sampler import LearningSampler

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


class NSGA2(LearningSampler):
    """Crosses the sizes of the shapes that no other beats in both loss and cost."""

    kind: Literal["nsga2"] = "nsga2"
    against: Literal["parameters", "flops", "latency"]
    """What is made small beside the loss: all parameters, forward FLOPs a token at the length that the budget
    counts them for, or the seconds of a forward pass of one sequence to its last token's logits, measured."""
    population: Annotated[int, Field(ge=2)] = 4
    """Shapes drawn by lot before any are crossed, and how many are parents from then on."""

    @property
    def startup_trials(self) -> int:
        return self.population

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("val_loss", self.against)

    def build(self, seed: int) -> BaseSampler:
        """Parents are the best of all trials known, so that a study built from a table continues it."""
        from optuna.samplers import NSGAIISampler
        from optuna.trial import TrialState

        population = self.population

        class Elitist(NSGAIISampler):
            def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
                if trial.state.is_finished():
                    return 0
                return 1 if len(self.get_population(study, 0)) >= population else 0

            def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
                if generation > 0:
                    return []
                return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

        return Elitist(population_size=population, seed=seed)
