"""The exceptions that stand for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: `problem` names the file, line, field or flag; `remedy` says what to do.

    The command line prints it as one line and exits 1; anything else that is raised is a defect of ours.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)  # both, so that it can be pickled by a worker process
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class BrokenModel(UserError):
    """The model itself is at fault: who runs it can mend that, who only asks it cannot."""
