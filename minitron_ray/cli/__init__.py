"""The command line. One file a command; what a command needs is imported in its body."""

import click

from minitron_ray import __version__
from minitron_ray.cli.ablation import ablation
from minitron_ray.cli.doctor import doctor
from minitron_ray.cli.group import CommandLine
from minitron_ray.cli.init import init
from minitron_ray.cli.plan import plan
from minitron_ray.cli.prune import prune
from minitron_ray.cli.query import query
from minitron_ray.cli.report import report
from minitron_ray.cli.run import run
from minitron_ray.cli.runs import runs
from minitron_ray.cli.schema import schema
from minitron_ray.cli.submit import submit
from minitron_ray.cli.validate import validate
from minitron_ray.cli.watch import watch


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="minitron-ray")
def main() -> None:
    """Make a small language model out of a big one, from one YAML file."""


for _command in (
    init,
    validate,
    plan,
    run,
    submit,
    watch,
    ablation,
    prune,
    report,
    query,
    runs,
    doctor,
    schema,
):
    main.add_command(_command)
