"""What the launcher's variables tell of a world of ranks, for messages to the user only.

Rank and size come from MPI; the variables only reveal a launcher that MPI does not know of.
"""

from collections.abc import Mapping


def world_problem(environment: Mapping[str, str], size: int) -> str:
    """Why a world of `size` ranks is not the one that was launched; empty if it is."""
    if size > 1:
        return ""
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return (
            "srun started several tasks, but MPI sees a world of one rank each. Type\n"
            "  srun --mpi=pmix python -m mellmpi …\n"
            "or, inside the allocation,  mpirun python -m mellmpi …"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"):
        if _number(environment, variable) > 1:
            return (
                f"mpirun started {environment[variable]} ranks, but mpi4py sees a world of one: "
                "it uses another MPI than this mpirun. Use the mpirun of the environment that "
                "mpi4py is installed in, or  MELLMPI_MPI=system bash launch/quickstart.sh"
            )
    return ""


def is_first(environment: Mapping[str, str]) -> bool:
    """True for the one process of a launch that prints messages."""
    ranks = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    return all(environment.get(variable, "0") == "0" for variable in ranks)


def _number(environment: Mapping[str, str], variable: str) -> int:
    """A launcher's variable; 1 where it is not a number."""
    value = environment.get(variable, "1")
    return int(value) if value.isdecimal() else 1
