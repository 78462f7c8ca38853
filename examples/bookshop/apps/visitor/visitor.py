"""A visitor: asks the shop for its books again and again, and says what it saw (Python, nothing but
its standard library).

    RATE=10 URL=http://front:8080/api/books python3 visitor.py

One line every five seconds: requests, answers by status, how long they took.
"""

import collections
import http.client
import json
import os
import threading
import time
from urllib.parse import urlsplit

URL = urlsplit(os.environ.get("URL", "http://front:8080/api/books"))
RATE = float(os.environ.get("RATE", "10"))
THREADS = 4
EVERY = 5

lock = threading.Lock()
seen = collections.Counter()
versions = collections.Counter()
took = []


def visit(connection):
    began = time.monotonic()
    connection.request("GET", URL.path)
    response = connection.getresponse()
    body = response.read()
    with lock:
        took.append(time.monotonic() - began)
        seen[str(response.status)] += 1
        if response.status == 200:
            for book in json.loads(body)["books"]:
                versions[book.get("version", "no reviews")] += 1


def visitor():
    connection = http.client.HTTPConnection(URL.hostname, URL.port or 80, timeout=10)
    due = time.monotonic()
    while True:
        due = max(due + THREADS / RATE, time.monotonic() - 1)
        time.sleep(max(0, due - time.monotonic()))
        try:
            visit(connection)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            with lock:
                seen[type(error).__name__] += 1


for _ in range(THREADS):
    threading.Thread(target=visitor, daemon=True).start()
while True:
    time.sleep(EVERY)
    with lock:
        times = sorted(took)
        line = {
            "requests": sum(seen.values()),
            "answers": dict(seen),
            "reviews": dict(versions),
        }
        if times:
            line["p50_ms"] = round(times[len(times) // 2] * 1000, 1)
            line["p99_ms"] = round(times[len(times) * 99 // 100] * 1000, 1)
        seen.clear()
        versions.clear()
        took.clear()
    print(json.dumps(line), flush=True)
