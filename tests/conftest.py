"""A background job of a script inherits an ignored SIGINT, and so would every program that a test starts and
then interrupts."""
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
