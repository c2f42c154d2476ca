"""A real, throw-away SLURM cluster on one machine: two nodes, eight pretended GPUs each, up in half a second. Linux, root.

Each node is one slurmd in network, host-name, mount and PID namespaces of its own: it has its own address, host name (node1, node2),
loopback and /etc/hosts, so a job that takes `localhost` for its rendezvous fails here as it does on a real cluster, and killing a node's
first process is a power loss. Nothing outside the cluster's folder is written, except one network bridge and its links.
Debian packages: slurmctld slurmd slurm-client munge iproute2.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo", "unshare", "setpriv", "ip")
NODES = ("node1", "node2")
GPUS = 8
NODE_PORT = 6818
CONTROLLER_PORT = 7100  # of the first cluster on a machine; below those that Linux hands out to whoever connects
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child")

# cred_expire: a requeued job waits that and a second more before it may start again; 120 s by default, 5 is the least.
# Times after which SLURM takes a process or a node for dead are such that a busy machine stays below them.
# config_overrides: the nodes have the CPUs and the memory that are written here, whatever the machine has.
CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
{preemption}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=86400
InactiveLimit=0
BatchStartTimeout=60
MessageTimeout=60
SlurmctldTimeout=30
SlurmdTimeout={node_timeout}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# A cluster's accounting needs a database. submitit and `megakd jobs` ask sacct, which is answered from `scontrol show job` here.
SACCT = r"""#!/usr/bin/env python3
import re, subprocess, sys
asked = [sys.argv[i + 1] for i, argument in enumerate(sys.argv[:-1]) if argument in ("-j", "--jobs")]
asked += [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--jobs=")]
columns = [sys.argv[i + 1] for i, argument in enumerate(sys.argv[:-1]) if argument in ("-o", "--format")]
columns += [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--format=")]
names = (columns or ["JobID,State,NodeList"])[0].split(",")
if not {"-n", "--noheader"} & set(sys.argv):
    print("|".join(names))
for job in [job for jobs in asked for job in jobs.split(",")] or [""]:
    found = subprocess.run(["scontrol", "-o", "show", "job", *([job] if job else [])], capture_output=True, text=True)
    for line in found.stdout.splitlines():
        fields = dict(re.findall(r"(\S+?)=(\S*)", line))
        if "JobId" not in fields:
            continue
        name, task = fields["JobId"], fields.get("ArrayTaskId")
        if task:
            name = fields["ArrayJobId"] + "_" + (task if task.isdigit() else f"[{task}]")
        row = {"JobID": name, "JobIDRaw": fields["JobId"], "State": fields["JobState"], "Elapsed": fields.get("RunTime", "")}
        print("|".join(row.get(column, fields.get(column, "")) for column in names))
"""


def why_not(programs: tuple[str, ...] = PROGRAMS, packages: str = "slurmctld slurmd slurm-client munge iproute2") -> str | None:
    """None where a cluster can be started, else the reason in words. packages: Debian's, which have the programs."""
    if not sys.platform.startswith("linux"):
        return "the test cluster needs Linux"
    missing = [program for program in programs if not _program(program)]
    if missing:
        return f"no test cluster here: {', '.join(missing)} not found (Debian: apt-get install {packages})"
    if os.geteuid() != 0:
        return "the test cluster needs root (namespaces, device files, slurmd)"
    probe = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no right to make namespaces here (a container without CAP_SYS_ADMIN?): {probe.stderr.strip()}"
    probe = _ip("link", "add", "slurmtprobe", "type", "veth", "peer", "name", "slurmtprobf", check=False)
    if probe.returncode:
        return f"no right to make network links here (no CAP_NET_ADMIN?): {probe.stderr.strip()}"
    _ip("link", "del", "slurmtprobe")
    return None


class Cluster:
    """One cluster in `folder`, which must be short (a socket's path has under 108 characters) and searchable by everybody (munge)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.disk = self.folder / "disk"  # of one megabyte, seen by all nodes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._bridge, self._network = "", ""

    def environment(self) -> dict[str, str]:
        """What sbatch, submitit and the tests need to find this cluster."""
        path = f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self) -> None:
        """Start every daemon and return when both nodes are idle."""
        for name in ("run", "state", "log", "dev", "bin", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        try:
            # Mounted before the nodes' own namespaces are made, so that they see it: a disk that can be filled, and enlarged by a remount.
            self.disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", self.disk], check=True)
            self._make_bridge()
            self._write_files()
            self._start_daemons(time.monotonic() + 120)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and take its network links away."""
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.get(name)
            if daemon is None or daemon.poll() is not None:
                continue
            daemon.send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)  # a node's first process takes all of the node along
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in NODES:
            _ip("link", "del", self._link(node), check=False)
        _ip("link", "del", self._bridge, check=False)
        subprocess.run(["umount", self.disk], check=False)

    def kill_node(self, node: str) -> None:
        """As if the machine lost its power: every process of the node dies at once."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def start_node(self, node: str) -> None:
        """Boot a node: namespaces, an address on the bridge, its service."""
        boot = (
            f"mount --make-rprivate /; mount --bind {shlex.quote(str(self.folder))}/hosts /etc/hosts; hostname {node}; "
            "mount -t tmpfs tmpfs /dev/shm; ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; "
            f"ip addr add {self.address(node)}/24 dev eth0; ip link set eth0 up; {self._service(node)}"
        )
        daemon = self._spawn(node, "unshare", *NAMESPACES, "--mount-proc", "sh", "-c", boot)
        ours = os.readlink("/proc/self/ns/net")
        _until(lambda: os.readlink(f"/proc/{daemon.pid}/ns/net") != ours, "a node's network namespace")
        _ip("link", "del", self._link(node), check=False)
        _ip("link", "add", self._link(node), "type", "veth", "peer", "name", "eth0", "netns", str(daemon.pid))
        _ip("link", "set", self._link(node), "master", self._bridge, "up")

    def _service(self, node: str) -> str:
        """The shell's last words at a node's start."""
        return f"exec slurmd -D -N {node}"

    def reconfigure(self, *, user_signal: bool = True, node_timeout: int = 60) -> None:
        """user_signal: whether a job that is preempted gets the signal of its --signal at once, or SLURM's default, SIGTERM alone.
        node_timeout: seconds without an answer after which a node is down."""
        self._write_configuration(user_signal, node_timeout)
        subprocess.run(["scontrol", "reconfigure"], env=os.environ | self.environment(), check=True)

    def node_processes(self, node: str, pattern: str) -> list[int]:
        """Pids, in this machine's numbering, of the node's processes whose command line has a match of `pattern`, the oldest first."""
        namespace = _namespace(self._daemons[node].pid, "pid_for_children")
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return sorted(pid for pid in pids if _namespace(pid, "pid") == namespace and re.search(pattern, _command_line(pid)))

    def _make_bridge(self) -> None:
        for number in range(256):  # the name is the lock on the subnet, so that two clusters can be up at once
            made = _ip("link", "add", f"slurmt{number}", "type", "bridge", check=False)
            if made.returncode == 0:
                self._bridge, self._network = f"slurmt{number}", f"198.18.{number}"  # a network for benchmarks, RFC 2544
                _ip("addr", "add", f"{self._network}.254/24", "dev", self._bridge)
                _ip("link", "set", self._bridge, "up")
                return
        raise RuntimeError(f"could not make a bridge: {made.stderr}")

    def _link(self, node: str) -> str:
        return f"{self._bridge}v{node.removeprefix('node')}"

    def address(self, node: str) -> str:
        """IPv4 address of a node."""
        return f"{self._network}.{node.removeprefix('node')}"

    def _write_files(self) -> None:
        for number in range(GPUS):  # slurmd wants one device file a GPU, whatever it is: these are like /dev/null
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n")
        self._write_hosts()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        self._write_configuration()

    def _write_hosts(self) -> None:
        addresses = {"localhost": "127.0.0.1", _host(): f"{self._network}.254"} | {node: self.address(node) for node in NODES}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))

    def _write_configuration(self, user_signal: bool = True, node_timeout: int = 60) -> None:
        hardware = f"Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 Feature=a100,ib Gres=gpu:{GPUS} State=UNKNOWN"
        nodes = [f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} Port={NODE_PORT} {hardware}" for node in NODES]
        text = CONFIGURATION.format(
            host=_host(),
            controller=f"{self._network}.254",
            port=CONTROLLER_PORT + int(self._bridge.removeprefix("slurmt")),
            node_port=NODE_PORT,
            folder=self.folder,
            preemption="SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
            node_timeout=node_timeout,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_daemons(self, deadline: float) -> None:
        folder, run = self.folder, self.folder / "run"
        files = {"key-file": folder / "munge.key", "socket": run / "munge.socket", "pid-file": run / "munged.pid"}
        files |= {"log-file": folder / "log" / "munged.log", "seed-file": run / "munge.seed"}
        self._spawn("munged", "munged", "--foreground", *(f"--{option}={path}" for option, path in files.items()))
        while not (run / "munge.socket").exists():
            self._check(deadline)
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        while self._ask("scontrol", "ping").returncode:
            self._check(deadline)
        for node in NODES:
            self.start_node(node)
        while self._ask("sinfo", "-h", "-p", "main", "-N", "-o", "%T").stdout.split() != ["idle"] * len(NODES):
            self._check(deadline)

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        # A daemon must not outlive the tests, however they end; nor believe that it runs inside another SLURM job.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))} | self.environment()
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=environment,
                cwd="/",
            )
        return self._daemons[name]

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=os.environ | self.environment(), capture_output=True, text=True, check=False)

    def _check(self, deadline: float) -> None:
        tails = "\n".join(f"== {name}\n{(self.folder / 'log' / f'{name}.out').read_text()[-2000:]}" for name in self._daemons)
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}:\n{tails}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"SLURM did not come up:\n{tails}")
        time.sleep(0.05)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin")


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_program("ip") or "ip", *arguments], check=check, capture_output=True, text=True)


def _until(condition, what: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise RuntimeError(f"waited in vain for {what}")


def _namespace(pid: int, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:  # ended meanwhile
        return None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
