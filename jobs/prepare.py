"""Raw rows → a packed, versioned dataset; prints its manifest.

ray job submit --working-dir . -- python jobs/prepare.py --config jobs/sft.yaml --store URI --set key=value
"""

import sys

from forge_ray import pipeline
from forge_ray.cli.job import main
from forge_ray.config.run import RunConfig

if __name__ == "__main__":
    sys.exit(main(RunConfig, pipeline.prepare))
