"""
llama_server.py MODEL MMPROJ THREADS --port PORT: serves two files by the llama.cpp of xllamacpp until it gets SIGTERM,
and then prints the peak of its memory.
"""

import re
import signal
import sys
from pathlib import Path

import xllamacpp


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also for the threads of the server
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, threads, _, port = sys.argv[1:]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.port = int(port)
params.n_ctx, params.n_parallel, params.warmup = 8192, 1, False
params.cache_prompt, params.verbosity = False, 0
server = xllamacpp.Server(params)
signal.sigwait({signal.SIGTERM})
print(re.search(r"VmHWM.*", Path("/proc/self/status").read_text())[0], flush=True)
