"""The questions of canaries.py, asked of a run's first step."""

from __future__ import annotations

from swift.utils import get_current_device, get_logger

from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.grown_layers import add_nothing
from megatron_bvpo.host.shaken_policy import adapters_begin_at_zero, shaken_policy
from megatron_bvpo.training import canaries
from megatron_bvpo.training.passes import Passes
from megatron_bvpo.training.referencing import References

logger = get_logger()


class CanaryQuestions:
    """Asks once whether the reference is one.

    Args:
        args: ms-swift's arguments.
        config: the model's configuration.
        models: this rank's unwrapped model chunks.
        passes: run the micro-batches that are listened to.
        references: known log-probs, compared with new ones.
        groups: process groups.
        new_layers: of a grown model, where they are trained and the reference is without them; else ().

    Attributes:
        due: the questions have still to be asked; never where the loss has no reference.
    """

    def __init__(
        self,
        args,
        config,
        models: list,
        passes: Passes,
        references: References,
        groups: ParallelGroups,
        new_layers: tuple[int, ...] = (),
    ):
        self.args, self.config, self.models = args, config, models
        self.passes, self.references, self.groups = passes, references, groups
        self.new_layers = new_layers
        self.due = passes.losses.uses_reference

    def ask(self, chunks: list[list[dict]], step: list[canaries.Heard], *, resumed: bool) -> None:
        """Before the first update: warn of what canaries.py describes. Collective.

        Args:
            chunks: the micro-batches of the step.
            step: what was heard of them while they were run.
            resumed: the run goes on from a checkpoint.
        """
        args, device = self.args, get_current_device()
        self.due = False
        n = 1 if len(chunks) == 1 else self.config.microbatch_group_size_per_vp_stage
        first = [batches[:n] for batches in chunks]
        adapted = args.tuner_type != "full"
        new = self.new_layers
        at_zero = add_nothing(self.models, new) and adapters_begin_at_zero(self.models)
        rounding = canaries.rounding_of(args, self.config.num_layers, device)
        plain = self.passes.listen(first)
        heard = any(micro_batch.policy_Q.numel() for micro_batch in plain)
        cached = self.references.beside_new(first[0], plain)
        with shaken_policy(self.models, adapted=adapted, new_layers=new) as shake:
            for scale in canaries.SCALES:
                shaken = shake(scale)
                mine = canaries.FirstStep(step, plain, self.passes.listen(first), cached).findings(rounding)
                mine += [(float(not at_zero), float(shaken)), (float(heard), 0.0)]
                *findings, (moved, shaken), (heard_anywhere, _) = canaries.largest_over_ranks(
                    mine, device, self.groups.world
                )
                shaken = shaken and heard_anywhere  # first micro-batches of demonstrations alone say nothing
                if not shaken or canaries.shows(findings):
                    break
        begins_equal = canaries.reference_begins_as_policy(args, resumed=resumed, policy_at_zero=not moved)
        silent_step = not canaries.noisy(args, self.config)
        if begins_equal and not silent_step:
            logger.info("Margins of the first step are not compared: the policy's training forward has dropout.")
        told = dict(begins_equal=begins_equal, silent_step=silent_step, shaken=bool(shaken), adapted=adapted)
        for line in canaries.warnings(findings, **told):
            logger.warning(line)
