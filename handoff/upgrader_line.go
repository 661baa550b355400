package handoff

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// line is the host's end of a channel. Messages leave in order from a goroutine of its
// own, so that the host never waits for whoever reads them.
type line struct {
	ch *wire.Channel

	mu      sync.Mutex
	cond    sync.Cond
	list    []outgoing
	closing bool
	err     error // of the first message that could not be sent
	ended   chan struct{}
}

type outgoing struct {
	m    *wire.Message
	then func(error)
}

func newLine(ch *wire.Channel) *line {
	l := &line{ch: ch, ended: make(chan struct{})}
	l.cond.L = &l.mu
	go l.run()
	return l
}

// put sends m, which is the line's from then on, with its records and sockets: see
// wire.Channel.Give. then, which may be nil, is told once what came of it, most often in the
// line's goroutine; an error means that nothing of m was or will be sent.
func (l *line) put(m *wire.Message, then func(error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		m.Dispose()
		if then != nil {
			then(errLineClosed)
		}
		return
	}
	l.list = append(l.list, outgoing{m, then})
	l.cond.Broadcast()
}

var errLineClosed = errors.New("the channel is closed")

func (l *line) run() {
	defer close(l.ended)
	for {
		l.mu.Lock()
		for len(l.list) == 0 && !l.closing {
			l.cond.Wait()
		}
		if len(l.list) == 0 {
			l.mu.Unlock()
			return
		}
		o := l.list[0]
		l.list[0] = outgoing{}
		l.list = l.list[1:]
		err := l.err
		l.mu.Unlock()
		if err != nil {
			o.m.Dispose()
		} else if err = l.ch.Give(o.m); err != nil {
			l.mu.Lock()
			l.err = err
			l.mu.Unlock()
		}
		if o.then != nil {
			o.then(err)
		}
	}
}

// sever closes the channel at once. What waits is not sent.
func (l *line) sever() {
	l.mu.Lock()
	if l.err == nil {
		l.err = errLineClosed
	}
	l.closing = true
	l.cond.Broadcast()
	l.mu.Unlock()
	_ = l.ch.Close()
}

// finish sends what waits, within limits, and closes the channel.
func (l *line) finish(limit time.Duration) {
	_ = l.ch.SetWriteDeadline(time.Now().Add(limit))
	l.mu.Lock()
	l.closing = true
	l.cond.Broadcast()
	l.mu.Unlock()
	<-l.ended
	_ = l.ch.Close()
}

// news is a message that came over a line, or the line's end.
type news struct {
	from *line
	m    *wire.Message
	err  error
}

// receive passes what comes to the host until the channel ends.
func (l *line) receive(to chan<- news, done <-chan struct{}) {
	for {
		m, err := l.ch.Recv()
		if errors.Is(err, os.ErrClosed) {
			return // our own doing
		}
		select {
		case to <- news{l, m, err}:
		case <-done:
			if m != nil {
				m.Dispose()
			}
			return
		}
		var lost *wire.DescriptorsLostError
		if err != nil && !errors.As(err, &lost) {
			return
		}
	}
}

// dupFile duplicates the descriptor of a file without making it a blocking one.
func dupFile(f *os.File) (fd int, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	if cerr := rc.Control(func(s uintptr) { fd, err = sys.Dup(int(s)) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}
