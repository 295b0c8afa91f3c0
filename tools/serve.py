"""Serve the built book on this machine."""

import functools
import http
import http.server
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parents[1] / "_build" / "html"
STAMP = SITE.with_name("site.stamp")  # of a whole site: tools/build_site.py


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each, and nothing of a half-built site."""

    def send_head(self):
        """Open the file that is asked for, if the site is whole."""
        if STAMP.exists():
            return super().send_head()
        self.send_error(
            http.HTTPStatus.SERVICE_UNAVAILABLE,
            explain="The book is being built, or its build broke off: make book",
        )
        return None

    def log_message(self, format: str, *args) -> None:
        """Say nothing about each request."""


class Server(http.server.ThreadingHTTPServer):
    """Serves several requests at once, and bears it when one breaks off."""

    def handle_error(self, request, client_address) -> None:
        """Say nothing when a browser turns away in the middle of a file."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(port: int) -> Server:
    """A server of the built book, on this machine only; port 0 takes a free one."""
    handler = functools.partial(Quiet, directory=str(SITE))
    return Server(("127.0.0.1", port), handler)


def stop_unless_whole() -> None:
    if not (STAMP.exists() and (SITE / "index.html").exists()):
        sys.exit("there is no book yet, or not the whole of it: make book")


def main() -> None:
    stop_unless_whole()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    try:
        server = serve(port)
    except OSError as error:
        sys.exit(f"port {port}: {error.strerror}. Take another: make serve PORT=8001")
    print(f"the book is at http://localhost:{server.server_port}/ (Ctrl-C stops)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
