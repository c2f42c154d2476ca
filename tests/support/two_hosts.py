"""Two machines with ssh between them and no scheduler: the nodes of `slurm_cluster`, an sshd in each. Linux, root.

Each has its own address, host name, loopback and processes; the file system is one, as a shared folder is. Keys and configuration lie in
the folder and in the nodes alone (a mount over /etc/ssh), so nobody's ~/.ssh is read or written.
Debian packages: openssh-server openssh-client pdsh iproute2.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from support.runs import REPOSITORY, environment, finish
from support.slurm_cluster import NODES, Cluster
from support.slurm_cluster import why_not as no_cluster

PACKAGES = "openssh-server openssh-client pdsh iproute2"
SERVER = """\
Port 22
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
CLIENT = """\
Host *
    IdentityFile {keys}/user
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def why_not() -> str | None:
    """None where two hosts can be started, else the reason in words."""
    return no_cluster(("sshd", "ssh", "ssh-keygen", "pdsh", "nsenter", "unshare", "setpriv", "ip"), PACKAGES)


class Hosts(Cluster):
    """Two hosts in `folder`. They are node1 and node2."""

    def start(self) -> None:
        for name in ("log", "ssh"):
            (self.folder / name).mkdir(parents=True)
        self.disk.mkdir()
        keys = self.folder / "ssh"
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
        (keys / "sshd_config").write_text(SERVER.format(keys=keys))
        (keys / "ssh_config").write_text(CLIENT.format(keys=keys))
        (self.folder / "hostfile").write_text("".join(f"{node} slots=1\n" for node in NODES))
        try:
            self._make_bridge()
            self._write_hosts()
            for node in NODES:
                self.start_node(node)
            for node in NODES:
                self._await_ssh(node, time.monotonic() + 60)
        except BaseException:
            self.stop()
            raise

    def _service(self, node: str) -> str:
        # its own /run, where sshd wants a folder to exist
        keys = shlex.quote(str(self.folder / "ssh"))
        return f"mount --bind {keys} /etc/ssh; mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec $(command -v sshd) -D -e"

    def on(self, node: str, *command: str | Path, folder: Path = REPOSITORY, **more: str) -> subprocess.Popen[str]:
        """Start a command on a node, as from a terminal there."""
        first = Path(f"/proc/{self._daemons[node].pid}/task/{self._daemons[node].pid}/children").read_text().split()[0]
        inside = ["nsenter", "--target", first, "--net", "--uts", "--mount", "--pid", f"--wd={folder}"]
        return subprocess.Popen(
            [*inside, *map(str, command)],
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def _await_ssh(self, node: str, end: float) -> None:
        while True:
            answered = finish(self.on(NODES[0], "ssh", "-o", "ConnectTimeout=2", node, "hostname"), 60)
            if answered.code == 0 and answered.out.split() == [node]:
                return
            log = (self.folder / "log" / f"{node}.out").read_text()
            assert time.monotonic() < end, f"no ssh to {node}: {answered.out}\n{log}"
            time.sleep(0.1)


def deepspeed() -> list[str]:
    """DeepSpeed's launcher, through this interpreter."""
    return [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
