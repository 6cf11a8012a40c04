"""The nine stages, one file each, in the order in which they run.

A stage is made from those before it alone. They may be imported at any time: what is heavy waits
until a stage is executed.
"""

from __future__ import annotations

from quantkit.ranks.join import Task
from quantkit.run.stage import Stage
from quantkit.stages.calibrate import Calibrate
from quantkit.stages.convert import Convert
from quantkit.stages.fetch import Fetch
from quantkit.stages.publish import Publish
from quantkit.stages.quantize import Quantize
from quantkit.stages.search import Search
from quantkit.stages.stitch import Stitch
from quantkit.stages.tune import Tune
from quantkit.stages.validate import Validate

STAGES: tuple[Stage, ...] = (
    Fetch(),
    Convert(),
    Calibrate(),
    Quantize(),
    Search(),
    Tune(),
    Stitch(),
    Validate(),
    Publish(),
)

# What other ranks do, by the names that rank 0 calls it by.
TASKS: dict[str, Task] = {name: task for stage in STAGES for name, task in stage.tasks.items()}
