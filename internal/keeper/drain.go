package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

const (
	maxLine   = 8 << 10 // bytes; a longer line is cut into several
	sinkLines = 1024    // lines waiting for a slow Output; more are dropped
)

// drains reads the workers' output while no supervisor leads, so that a worker
// neither blocks on a full pipe nor, for want of a reader, gets SIGPIPE. The
// keeper's loop owns it. Entries change only while a supervisor leads, so the set
// of pipes is fixed from start to stop.
type drains struct {
	log    hclog.Logger
	sink   *sink
	active []*drain
	on     bool
}

type drain struct {
	name string
	done chan struct{}
	quit chan struct{} // closed by stop

	mu      sync.Mutex
	f       *os.File // nil until it could be opened
	stopped bool
}

func (d *drains) start(entries []*held) {
	d.on = true
	for _, h := range entries {
		fds := h.descriptors(nil)
		if len(fds) == 0 {
			continue
		}
		dr := &drain{name: h.name(), done: make(chan struct{}), quit: make(chan struct{})}
		var err error
		if dr.f, err = sys.ReopenPipe(fds[0]); err != nil && !scarce(err) {
			d.log.Error("cannot read a worker's output while there is no supervisor; the worker blocks when its pipe is full", "entry", h.key(), "error", err)
			continue
		}
		if err != nil {
			d.log.Error("out of descriptors: a worker's output is read when there is one again; until then the worker blocks when its pipe is full", "entry", h.key(), "error", err)
		}
		d.active = append(d.active, dr)
		h.refs.Add(1)
		go func() {
			defer close(dr.done)
			defer h.release()
			if dr.open(fds[0]) {
				dr.run(d.sink)
			}
		}()
	}
}

// stop returns once nothing is read any more. What was read before is written.
func (d *drains) stop() {
	d.on = false
	for _, dr := range d.active {
		close(dr.quit)
		dr.mu.Lock()
		dr.stopped = true
		if dr.f != nil {
			_ = dr.f.Close()
		}
		dr.mu.Unlock()
	}
	for _, dr := range d.active {
		<-dr.done
	}
	d.active = nil
}

func scarce(err error) bool { return errors.Is(err, sys.EMFILE) || errors.Is(err, sys.ENFILE) }

// reopenTime is how often a pipe is tried again for which there was no descriptor.
const reopenTime = 100 * time.Millisecond

// open waits until the pipe could be opened. It reports false when stop came first, or
// when it cannot be.
func (dr *drain) open(fd int) bool {
	if dr.f != nil {
		return true
	}
	t := time.NewTicker(reopenTime)
	defer t.Stop()
	for {
		select {
		case <-dr.quit:
			return false
		case <-t.C:
		}
		f, err := sys.ReopenPipe(fd)
		if err != nil {
			if !scarce(err) {
				return false
			}
			continue
		}
		dr.mu.Lock()
		defer dr.mu.Unlock()
		if dr.stopped {
			_ = f.Close()
			return false
		}
		dr.f = f
		return true
	}
}

func (dr *drain) run(out *sink) {
	defer dr.f.Close()
	buf := make([]byte, maxLine)
	n := 0 // bytes of an unfinished line in buf
	emit := func(line []byte) { out.write(fmt.Appendf(nil, "%s: %s\n", dr.name, printable(line))) }
	for {
		m, err := dr.f.Read(buf[n:])
		n += m
		rest := buf[:n]
		for {
			line, after, found := bytes.Cut(rest, []byte{'\n'})
			if !found {
				break
			}
			emit(line)
			rest = after
		}
		if len(rest) == len(buf) || (err != nil && len(rest) > 0) {
			emit(rest)
			rest = nil
		}
		n = copy(buf, rest)
		if err != nil {
			return // the worker closed its end, or stop
		}
	}
}

// printable makes what a worker printed safe for a terminal: it can neither drive
// one nor pass for several lines.
func printable(line []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return '.'
		}
		return r
	}, bytes.ToValidUTF8(bytes.TrimSuffix(line, []byte{'\r'}), []byte{'?'}))
}

// sink writes lines to Output in a goroutine of its own, so that an Output that
// blocks holds up nobody; what does not fit into its queue is dropped and counted.
type sink struct {
	out     io.Writer
	lines   chan []byte
	dropped atomic.Uint64
	done    chan struct{}
}

func newSink(out io.Writer) *sink {
	if out == nil {
		out = io.Discard
	}
	s := &sink{out: out, lines: make(chan []byte, sinkLines), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for line := range s.lines {
			_, _ = s.out.Write(line)
			if n := s.dropped.Swap(0); n > 0 {
				_, _ = fmt.Fprintf(s.out, "ktlsvisor: %d lines of worker output dropped\n", n)
			}
		}
	}()
	return s
}

func (s *sink) write(line []byte) {
	select {
	case s.lines <- line:
	default:
		s.dropped.Add(1)
	}
}

// close writes what is queued and gives an Output that blocks up after a second.
// No drain may be running.
func (s *sink) close() {
	close(s.lines)
	select {
	case <-s.done:
	case <-time.After(time.Second):
	}
}
