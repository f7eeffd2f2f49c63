"""Kills a process that works on a FileStore, again and again, and checks what is left; then fills a
disk of 1 MB where it may mount one. Usage: store_kill.py STORE_KILL [ROUNDS]
"""
import os
import random
import subprocess
import sys
import tempfile
import time


def kill_loop(program, rounds, folder):
    store, log = os.path.join(folder, "store"), os.path.join(folder, "log")
    chance = random.Random(1)
    for number in range(rounds):
        worker = subprocess.Popen([program, store, log, str(number)], stdout=subprocess.PIPE)
        if worker.stdout.readline() != b"ready\n":
            sys.exit(f"round {number}: exit code {worker.wait()}")
        time.sleep(chance.uniform(0, 0.03))
        worker.kill()
        worker.wait()
        worker.stdout.close()
    subprocess.run([program, store, log, str(rounds), "check"], check=True)
    told = sum(line[0] in "afe" for line in open(log))
    print(f"{rounds} kills, {told} acknowledged changes, none lost")
    return 0 if told > 10 * rounds else "too little was done to tell"


def full_disk(program, folder):
    mount = f"mount -t tmpfs -o size=1m tmpfs {folder} && {program} {folder} fill"
    probe = subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL)
    if probe.returncode:
        return print("no 1 MB disk here: mounting is not allowed")
    subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=True)


with tempfile.TemporaryDirectory(dir=os.environ.get("VALAR_STORE_DIR")) as place:
    if sys.platform == "linux":
        os.mkdir(os.path.join(place, "full"))
        full_disk(sys.argv[1], os.path.join(place, "full"))
    sys.exit(kill_loop(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50, place))
