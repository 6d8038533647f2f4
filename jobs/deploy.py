"""A released model → an endpoint on this cluster; prints the deployment.

ray job submit --working-dir . -- python jobs/deploy.py --config jobs/deploy.yaml --store URI --set key=value
"""

import sys

from forge_ray import pipeline
from forge_ray.cli.job import main
from forge_ray.config.release import DeployConfig

if __name__ == "__main__":
    sys.exit(main(DeployConfig, pipeline.deploy))
