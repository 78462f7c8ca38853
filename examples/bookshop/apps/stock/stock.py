"""The stock: how many of a book are there (Python, nothing but its standard library).

A TCP protocol of lines in which the server speaks first, as SMTP, FTP and MySQL do:

    S: 200 bookshop stock
    C: COUNT 9780131103627
    S: 12
    C: QUIT
"""

import socketserver

BOOKS = {"9780131103627": 12, "9780262510875": 3, "9781718503106": 41}


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"200 bookshop stock\r\n")
        for line in self.rfile:
            match line.decode("ascii", "replace").split():
                case ["COUNT", isbn]:
                    self.wfile.write(b"%d\r\n" % BOOKS.get(isbn, 0))
                case ["QUIT"]:
                    return
                case _:
                    self.wfile.write(b"500 say COUNT ISBN or QUIT\r\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("", 7000), Handler) as server:
        server.serve_forever()
