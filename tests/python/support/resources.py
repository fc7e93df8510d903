"""What the processes of a server take, read out of /proc: a leak is what they take more of after work than before."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Resources:
    """Sums over the processes of one session."""

    processes: int
    #: Memory of their own: without files, whose pages come and go.
    resident_bytes: int
    threads: int
    sockets: int
    #: Descriptors that are no sockets.
    files: int


def resources_of_session(leader_pid):
    """What all processes take that belong to the session of this process."""
    found = [_of_process(folder) for folder in _session(leader_pid)]
    sums = [sum(column) for column in zip(*(each for each in found if each is not None), strict=True)]
    return Resources(*sums)


def session_pids(leader_pid):
    """The processes of the session that this process leads, those that have ended left out."""
    return {int(folder.name) for folder in _session(leader_pid)}


def _session(leader_pid):
    folders = []
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # Behind the name, which may hold spaces: state, parent, group, session.
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader_pid and state not in "ZX":
            folders.append(folder)
    return folders


def _of_process(folder):
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        links = []
        for descriptor in (folder / "fd").iterdir():
            try:
                links.append(str(descriptor.readlink()))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return None  # ended meanwhile
    own_kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    sockets = sum(link.startswith("socket:") for link in links)
    return 1, own_kib << 10, int(status["Threads"]), sockets, len(links) - sockets
