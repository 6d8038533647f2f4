"""The whole path, from rows to a released (and, with a deploy section, served) model; prints the outcome.

ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/sft.yaml --store URI --set key=value
"""

import sys

from forge_ray import pipeline
from forge_ray.cli.job import main
from forge_ray.config.run import RunConfig

if __name__ == "__main__":
    sys.exit(main(RunConfig, pipeline.run))
