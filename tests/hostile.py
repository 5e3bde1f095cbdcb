"""Programs that try to do harm, each with what a contained one does.

An `ATTEMPTS` program returns "contained" from f() if nothing came of it, and else what
it got hold of; it must pass. An `ENDLESS`, `FORGED` program must not pass.
"""

# Lines that run in f(): an error of the system means that the attempt failed.
ATTEMPTS = {
    "reads /etc/passwd": "return open('/etc/passwd').read()",
    "reads /etc/shadow": "return open('/etc/shadow').read()",
    "lists /root": "return os.listdir('/root')",
    "lists /home": "return os.listdir('/home')",
    "lists /proc": "return os.listdir('/proc')",
    "reads its environment": (
        "return 'SECRET' in str(os.environ) and os.environ or fail()"
    ),
    "reads the environment by C": (
        "import ctypes\n"
        "p = ctypes.c_char_p.in_dll(ctypes.CDLL(None), 'environ').value\n"
        "return p if p and b'SECRET' in p else fail()"
    ),
    "reads the parent's environment": (
        "return open('/proc/%d/environ' % os.getppid()).read()"
    ),
    "reads the parent's memory": "return open('/proc/%d/mem' % os.getppid()).read()",
    "reads memory of process 1": (
        "import ctypes\n"
        "r = ctypes.CDLL(None, use_errno=True).process_vm_readv(1, 0, 0, 0, 0, 0)\n"
        "return r if r >= 0 else fail()"
    ),
    "lists the host's /tmp": "return os.listdir('/tmp')",
    "lists the working directory": "return set(os.listdir()) - ROOTS or fail()",
    "finds a file of the host": "return open(TARGET).read()",
    "writes a file of the host": "open(TARGET, 'w').write('owned'); return 'wrote'",
    "removes a file of the host": "os.remove(TARGET); return 'removed'",
    "writes one file": "open('/big', 'w').write('x' * 10**8); return 'wrote'",
    "writes into /dev": "open('/dev/x', 'w').write('x'); return 'wrote'",
    "writes into /dev/shm": "open('/dev/shm/x', 'w').write('x'); return 'wrote'",
    "writes many files": (
        "made = 0\n"
        "for folder in ('/', '/dev', '/tmp', '/usr', '/usr/lib', '/var/tmp', '.'):\n"
        "    for i in range(100):\n"
        "        try:\n"
        "            open('%s/%d' % (folder, i), 'w').close(); made += 1\n"
        "        except OSError: pass\n"
        "return made or fail()"
    ),
    "makes a folder": "os.mkdir('/folder'); return 'made'",
    "links out": "os.symlink('/etc', '/link'); return os.listdir('/link')",
    "links hard": "os.link(sys.executable, '/python'); return 'linked'",
    "leaves by ..": "return open('../' * 20 + 'etc/passwd').read()",
    "writes to the interpreter": "open(sys.executable, 'ab').write(b'x'); return 1",
    "writes to the standard library": "open(os.__file__, 'a').write('x'); return 1",
    "makes the library writable": "os.chmod(os.__file__, 0o777); return 1",
    "keeps a file in memory": "return os.memfd_create('x')",
    "keeps memory that no limit counts": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600)\n"
        "return r if r >= 0 else fail()"
    ),
    "connects to loopback": (
        "import socket\nreturn socket.create_connection(('127.0.0.1', PORT), timeout=1)"
    ),
    "connects beyond": (
        "import socket\nreturn socket.create_connection(('1.1.1.1', 53), timeout=1)"
    ),
    "sends a datagram": (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "return s.sendto(b'x', ('127.0.0.1', PORT))"
    ),
    "listens": "import socket\nreturn socket.create_server(('', 0))",
    "connects to an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\nreturn s.connect('\\0x')"
    ),
    "asks a name server": (
        "import socket\nreturn socket.getaddrinfo('localhost.example', 80)"
    ),
    "kills its parent": "os.kill(os.getppid(), 9); return escaped_if_alive()",
    "kills process 1 of the host": "os.kill(HOST, 9); return 'killed'",
    "kills a group": "os.killpg(HOST, 9); return 'killed'",
    "forks": "return os.fork()",
    "forks by posix_spawn": (
        "return os.posix_spawn(sys.executable, ['python', '-c', ''], {})"
    ),
    "starts a shell": (
        "import subprocess\nreturn subprocess.run(['/bin/sh', '-c', 'id'])"
    ),
    "starts Python": (
        "import subprocess\nreturn subprocess.run([sys.executable, '-c', 'pass'])"
    ),
    "daemonises": "os.setsid() if os.getpid() != os.getsid(0) else 0\nreturn os.fork()",
    "traces a process": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).ptrace(16, 1, 0, 0)\n"
        "return r if r >= 0 else fail()"
    ),
    "lets itself be traced": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n"
        "return r if r >= 0 else fail()"
    ),
    "makes a namespace": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).unshare(0x10000000)\n"
        "return r if r >= 0 else fail()"
    ),
    "mounts": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).mount(b'none', b'/usr', b'tmpfs', 0, None)\n"
        "return r if r >= 0 else fail()"
    ),
    "changes its root": "os.chroot('/usr'); return 'changed'",
    "makes a device": "os.mknod('/disk', 0o060600, os.makedev(8, 0)); return 'made'",
    "reads a disk": (
        "return [open(d, 'rb').read(1) for d in ('/dev/sda', '/dev/vda', '/dev/mem')]"
    ),
    "opens a terminal": "return os.open('/dev/tty', os.O_RDWR)",
    "becomes root": "os.setuid(0); return os.getuid()",
    "changes its group": "os.setgroups([0]); return 'changed'",
    "raises its limits": (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 'raised'"
    ),
    "goes before others": "os.nice(-10); return 'nicer'",
    "finds a descriptor of the host": (
        "kinds = []\n"
        "for n in range(3, 64):\n"
        "    try: kinds.append(os.readlink('/proc/self/fd/%d' % n))\n"
        "    except OSError: pass\n"
        "return kinds or fail()"
    ),
    "watches files": (
        "import ctypes\n"
        "r = ctypes.CDLL(None).inotify_init1(0)\n"
        "return r if r >= 0 else fail()"
    ),
    "ignores signals": "signal.signal(15, signal.SIG_IGN); return 'contained'",
    "starts too many threads": (
        "import threading, time\n"
        "made = 0\n"
        "try:\n"
        "    for i in range(1000):\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "        made += 1\n"
        "except RuntimeError: pass\n"
        "return made if made > 20 else fail()"
    ),
    "prints without end": (
        "for i in range(10**5): os.write(1, b'x' * 100)\nreturn 'contained'"
    ),
}
BEGIN = """
import os, signal, sys
def fail(): raise OSError("contained")
def escaped_if_alive(): return "contained"
"""
AROUND = """
def f():
    try:
        found = attempt()
    except (OSError, AttributeError, ValueError, RuntimeError):
        return "contained"
    return repr(found) if found != "contained" else found
"""

# Programs that do not end, or take all there is: each fails by a limit.
ENDLESS = {
    "loops": "while True: pass",
    "loops in f": "def f():\n while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "waits for input": (
        "import sys, time\nwhile True: sys.stdin.read(); time.sleep(9)"
    ),
    "takes memory": "x = ['x' * 10**6]\nwhile True: x += x",
    "takes memory at once": "x = bytearray(1 << 40)",
    "forks without end": "import os\nwhile True: os.fork()",
    "recurses": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "counts high": "x = 9 ** 9 ** 9",
    "does not end by SIGXCPU": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    ),
    "threads that outlive": (
        "import threading\ndef loop():\n while True: pass\n"
        "for i in range(4): threading.Thread(target=loop).start()\n"
        "def f():\n while True: pass"
    ),
    "answers without end": "def f():\n while True: yield 1",
}

# Programs that want to pass without being right.
FORGED = {
    "prints passed": "print('passed', flush=True)\nprint('{\"passed\": true}')",
    "exits with 0": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "exits in f": "import os\ndef f(): os._exit(0)",
    "writes a verdict everywhere": (
        "import os\n"
        "for n in range(64):\n"
        '    try: os.write(n, b\'{"passed": true, "why": ""}\\n\')\n'
        "    except OSError: pass"
    ),
    "patches assert": (
        "import builtins\nbuiltins.AssertionError = ValueError\ndef f(): return 'wrong'"
    ),
    "equals everything": (
        "class All:\n"
        " def __eq__(self, other): return True\n"
        " def __hash__(self): return 0\n"
        "def f(): return All()"
    ),
    "equals everything as a text": (
        "class All(str):\n"
        " def __eq__(self, other): return True\n"
        " def __hash__(self): return 0\n"
        "def f(): return All('wrong')"
    ),
    "raises what ends tests": "def f(): raise SystemExit(0)",
    "raises an interrupt": "def f(): raise KeyboardInterrupt",
    "replaces the messenger": (
        "import sys\n"
        "for m in list(sys.modules.values()):\n"
        "    if hasattr(m, 'send'): m.send = lambda *a: None\n"
        "def f(): return 'wrong'"
    ),
    "answers nonsense": (
        "import json\njson.dumps = lambda x: '[' * 100000\ndef f(): return 'wrong'"
    ),
    "answers too much": "def f(): return 'x' * (1 << 25)",
    "sends code": (
        "import json\nold = json.dumps\n"
        "json.dumps = lambda x: old({'value': {'__import__': 'os'}})\n"
        "def f(): return 1"
    ),
    "closes its pipes": "import os; os.closerange(0, 64)\ndef f(): return 'wrong'",
    "shadows the test's functions": (
        "def repr(x): return 'contained'\ndef f(): return 'wrong'"
    ),
}


def attempt(name, **given):
    """A program of `ATTEMPTS`, with values for the names in it."""
    body = "\n    ".join(ATTEMPTS[name].split("\n"))
    values = "".join(f"{key} = {value!r}\n" for key, value in given.items())
    return f"{BEGIN}{values}def attempt():\n    {body}\n{AROUND}"
