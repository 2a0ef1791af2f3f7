"""A trainer that keeps what torch.compile did."""

from __future__ import annotations

import json
from collections import Counter

from tests.distributed.recorders import record_first_step


def record_compiled(base, folder):
    """Writes compiled.json: `times` each function was compiled, what `failed`, and torch's `limit` of times."""
    import torch._dynamo as dynamo

    class Recorder(record_first_step(base, folder)):
        def finalize_training(self):
            super().finalize_training()
            frames = dynamo.utils.get_compilation_metrics()
            found = {
                "times": Counter(frame.co_name for frame in frames),
                "failed": [[frame.co_name, frame.fail_reason] for frame in frames if frame.fail_type],
                "limit": dynamo.config.recompile_limit,
            }
            (folder / "compiled.json").write_text(json.dumps(found))

    return Recorder
