"""Which redirects a client of a host follows."""

from __future__ import annotations

import urllib.parse
import urllib.request
from typing import Any


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows where scheme, host and port stay as they are; anywhere else the caller's headers, a password perhaps, would go along."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """None leaves the redirect to the opener's errors: an HTTPError of this code."""
        here, there = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        same = (here.scheme, here.netloc.lower()) == (there.scheme, there.netloc.lower())
        return super().redirect_request(req, fp, code, msg, headers, newurl) if same else None
