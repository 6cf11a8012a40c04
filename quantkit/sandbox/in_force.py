"""Say what a sandboxed process cannot do on this machine, and what it still could."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protection:
    """What was in force for a child. Sentences: `in_force` and `missing`."""

    seccomp: bool = False
    landlock: int = 0  # the version of its interface; 0: none
    namespaces: tuple[str, ...] = ()
    capabilities: bool = False  # whether they were dropped

    @property
    def files(self) -> bool:
        """Return whether the kernel keeps it from other files."""
        return self.landlock > 0 or "mount" in self.namespaces

    @property
    def network(self) -> str:
        """By what means the child had no network."""
        return "denied by the kernel (seccomp)" if self.seccomp else "denied within Python only"

    @property
    def in_force(self) -> tuple[str, ...]:
        found = []
        if self.seccomp:
            found.append("The kernel denies sockets, programs and processes (seccomp).")
        if self.landlock:
            found.append(
                "The kernel denies all files but the model's copy, the interpreter and the output"
                f" (Landlock, version {self.landlock})."
            )
        if self.namespaces:
            names = ", ".join(self.namespaces)
            found.append(f"It runs in namespaces of its own ({names}).")
        if self.capabilities:
            found.append("It has no administrator rights, whoever starts it.")
        return tuple(found)

    @property
    def missing(self) -> tuple[str, ...]:
        found = []
        if not self.seccomp:
            found.append(
                "This system has no seccomp: sockets and programs are denied within Python only."
            )
        if not self.files:
            found.append(
                "This system has neither Landlock nor mount namespaces for plain users: a broken"
                " parser could read and change files of the user that runs quantkit."
            )
        if "pid" not in self.namespaces:
            found.append(
                "This system gives no pid namespace: the sandboxed process can see which"
                " processes run, though it cannot touch them."
            )
        return tuple(found)

    def __str__(self) -> str:
        parts = ["seccomp"] * self.seccomp + [f"Landlock {self.landlock}"] * bool(self.landlock)
        parts += [f"namespaces ({', '.join(self.namespaces)})"] * bool(self.namespaces)
        return ", ".join(parts) or "Python's own means only"


def nothing() -> None:
    """Do nothing: for a child that is only asked for its protection."""
