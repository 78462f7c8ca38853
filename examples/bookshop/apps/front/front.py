"""The shop's front: what a visitor's browser talks to (Python, Flask).

    GET /            the shop as a page
    GET /api/books   the same as JSON
    GET /healthz     for the kubelet

It asks the catalogue (HTTP/1.1), the reviews (gRPC) and the stock (a TCP protocol in which the server
speaks first), and knows nothing of a mesh. It passes the W3C trace context on, as any traced
application does.
"""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import requests
from flask import Flask, g, jsonify, render_template_string, request

CATALOG = os.environ.get("CATALOG", "http://catalog:8080")
REVIEWS = os.environ.get("REVIEWS", "reviews:9090")
STOCK = os.environ.get("STOCK", "stock:7000")
CONTEXT = ("traceparent", "tracestate")

messages, services = grpc.protos_and_services("reviews.proto")
reviews = services.ReviewsStub(grpc.insecure_channel(REVIEWS))
catalog = requests.Session()
pool = ThreadPoolExecutor(16)
app = Flask(__name__)


def context():
    """The caller's trace context, to be passed on."""
    return {name: request.headers[name] for name in CONTEXT if name in request.headers}


def books(headers):
    answer = catalog.get(f"{CATALOG}/books", headers=headers, timeout=5)
    answer.raise_for_status()
    return answer.json()


def reviews_of(isbn, headers):
    try:
        answer = reviews.List(
            messages.ListRequest(isbn=isbn), metadata=list(headers.items()), timeout=5
        )
    except grpc.RpcError as error:
        return {"error": f"{error.code().name}: {error.details()}"}
    return {
        "version": answer.version,
        "reviews": [
            {"reader": r.reader, "text": r.text, "stars": r.stars} for r in answer.reviews
        ],
    }


def in_stock(isbns):
    """Asks the stock line by line; it greets whoever connects."""
    host, port = STOCK.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            lines = connection.makefile("rw", newline="\r\n")
            greeting = lines.readline().strip()
            counts = {}
            for isbn in isbns:
                lines.write(f"COUNT {isbn}\r\n")
                lines.flush()
                counts[isbn] = int(lines.readline())
            lines.write("QUIT\r\n")
            lines.flush()
            return greeting, counts
    except (OSError, ValueError) as error:
        return f"the stock does not answer: {error}", {}


def shop():
    headers = context()
    listed = books(headers)
    isbns = [book["isbn"] for book in listed]
    stock = pool.submit(in_stock, isbns)
    said = list(pool.map(lambda isbn: reviews_of(isbn, headers), isbns))
    greeting, counts = stock.result()
    for book, answer in zip(listed, said):
        book["stock"] = counts.get(book["isbn"])
        book.update(answer)
    return {"books": listed, "stock": greeting}


@app.get("/api/books")
def api():
    try:
        return jsonify(shop())
    except requests.RequestException as error:
        return jsonify({"error": f"the catalogue does not answer: {error}"}), 502


@app.get("/healthz")
def health():
    return "ok\n"


PAGE = """<!doctype html><title>Bookshop</title>
<h1>Bookshop</h1>
{% for book in books %}
<h2>{{ book.title }}</h2>
<p>{{ book.author }}, {{ "%.2f" | format(book.price / 100) }} &euro;{% if book.stock is not none %},
{{ book.stock }} in stock{% endif %}</p>
{% if book.error %}<p><em>No reviews: {{ book.error }}</em></p>{% endif %}
<ul>{% for review in book.reviews %}
<li>{% if review.stars %}{{ "&#9733;" | safe * review.stars }} {% endif %}{{ review.text }}
({{ review.reader }})</li>{% endfor %}</ul>
{% endfor %}
<p><small>{{ stock }}</small></p>"""


@app.get("/")
def page():
    try:
        return render_template_string(PAGE, **shop())
    except requests.RequestException as error:
        return f"the catalogue does not answer: {error}\n", 502


if __name__ == "__main__":
    import waitress

    waitress.serve(app, listen="*:8080", threads=16)
