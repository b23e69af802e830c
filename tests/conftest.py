"""A background job of a script inherits an ignored SIGINT, and so would every program that a test starts and
then interrupts."""
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    "Every fault that was tried and what became of it, also where workers of pytest-xdist ran the tests."
    for report in terminalreporter.getreports('passed'):
        said = dict(report.user_properties)
        if report.when == 'call' and 'fault' in said:
            terminalreporter.write_line(f"\n  fault:   {said['fault']}\n  outcome: {said['outcome']}")
