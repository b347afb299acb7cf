"""A page in a headless Chromium, controlled through its debugging pipe."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """`with Browser(path) as page: page.run("document.title")`; `page.save(png)` takes a picture."""

    def __init__(self, path, profile, width=1200, height=900):
        self.path, self.profile, self.size = path, profile, (width, height)
        self.numbers = itertools.count(1)
        self.session = None
        self.rest = b""

    def __enter__(self):
        theirs_in, self.out = os.pipe()
        self.inp, theirs_out = os.pipe()

        flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
        flags += f" --remote-debugging-pipe --user-data-dir={self.profile}"
        # Chromium expects its pipes at 3 and 4, which needs a process in between.
        wire = (
            "import os, sys; a, b = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2])); "
            "os.dup2(a, 30); os.dup2(b, 40); os.dup2(30, 3); os.dup2(40, 4); "
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [sys.executable, "-c", wire, str(theirs_in), str(theirs_out), CHROMIUM, *flags.split()],
            pass_fds=(theirs_in, theirs_out),
            **quiet,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        size = {"width": self.size[0], "height": self.size[1]}
        self.send("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        self.send("Page.bringToFront")
        self.send("Page.navigate", url=f"file://{self.path}")
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        os.close(self.inp)
        os.close(self.out)

    def send(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                got = os.read(self.inp, 1 << 16)
                assert got, "the browser has ended"
                self.rest += got
            answer, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def run(self, script):
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, tries=200):
        """The value of an expression, once it is true."""
        for _ in range(tries):
            if found := self.run(script):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true in the page: {script}")

    def save(self, path):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
