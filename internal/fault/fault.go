package fault

// Verdict is what is to be done at a step besides what At did itself.
type Verdict struct {
	Err    error // the system call of this step fails with it
	Drop   bool  // the message of this step is not sent, and nobody is told
	Repeat bool  // it is sent twice
	Close  bool  // the channel ends here, in both directions
	Fill   bool  // the peer's queue is full before it is sent
}

// Actions of a plan. Those above the line are At's own.
const (
	Kill   = "kill"   // SIGKILL for this process
	Stop   = "stop"   // SIGSTOP for this process; whoever watches sends SIGCONT
	Hold   = "hold"   // wait, at most holdLimit, until whoever watches says go
	Delay  = "delay"  // wait for delayTime
	NoFile = "nofile" // no descriptor can be opened for noFileTime (EMFILE, MSG_CTRUNC)

	Drop   = "drop"
	Repeat = "repeat"
	Close  = "close"
	Fill   = "fill"
	Fail   = "fail=" // and the name of an errno
)
