package load

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// readBuffer is what a client reads at a time. A frame of the default size
// fits several times; larger ones come in pieces.
const readBuffer = 2048

// outcome is how a session stands.
type outcome int

const (
	alive   outcome = iota
	clean           // every echo came, close_notify both ways
	unclean         // every echo came, but the end was not in order
	lost
)

// A client is one connection: a goroutine that sends and one that reads and
// checks. What both, the monitor and the reports need is under mu.
type client struct {
	fleet *Fleet
	index int
	raw   *watchedConn
	conn  Conn
	gen   generator

	gone    chan struct{} // closed when the session has ended, however
	drained chan struct{} // closed when the last frame's echo has come

	mu        sync.Mutex
	inflight  ring // when the frames that still wait were sent, oldest first
	nextSeq   uint64
	lastEcho  time.Duration
	drainedAt time.Duration
	final     bool // no frame follows the ones in flight
	outcome   outcome
	why       string // for a session that is lost or unclean
	detail    string
	endedIn   int // phase

	current   Counters      // of the current phase
	worst     time.Duration // longest stall of all phases
	lossy     bool          // the current phase allows gaps
	lossyEnd  time.Duration // when the last phase that did ended; 0 is never
	phase     int           // the current phase
	lossyIn   int           // the last phase that allowed gaps
	gapPhases map[int]int64 // phases whose crash left a gap here, and bytes missing
}

func newClient(f *Fleet, index int, raw *watchedConn, conn Conn) *client {
	return &client{
		fleet: f, index: index, raw: raw, conn: conn,
		gen:     generator{seed: f.opts.Seed + uint64(index), min: f.opts.MinPayload, max: f.opts.MaxPayload},
		gone:    make(chan struct{}),
		drained: make(chan struct{}),
	}
}

// send writes a frame every interval until the fleet stops or the session
// ends, then one more, waits for all echoes and closes its direction.
func (c *client) send() {
	interval := c.fleet.opts.Interval
	rng := rand.New(rand.NewPCG(c.gen.seed, 1))
	timer := time.NewTimer(time.Duration(rng.Int64N(int64(interval) + 1)))
	defer timer.Stop()
	var buf []byte
	for final := false; !final; {
		select {
		case <-c.gone:
			return
		case <-c.fleet.stopping:
			// The last frame shows that the stream is whole up to its end,
			// even if a crash took every frame before it.
			final = true
		case <-timer.C:
		}
		buf = c.gen.appendFrame(buf[:0], c.register(final))
		if _, err := c.conn.Write(buf); err != nil {
			c.end(lost, "sending: "+reason(err), err)
			return
		}
		if err := c.changeKeys(); err != nil {
			c.end(lost, "changing keys: "+reason(err), err)
			return
		}
		timer.Reset(interval*3/4 + time.Duration(rng.Int64N(int64(interval)/2+1)))
	}
	select {
	case <-c.gone:
	case <-c.drained:
		if err := c.conn.CloseWrite(); err != nil {
			c.end(unclean, "sending close_notify: "+reason(err), err)
		}
	}
}

// changeKeys sends a KeyUpdate when it is time for one.
func (c *client) changeKeys() error {
	every := c.fleet.opts.KeyUpdateEvery
	if every == 0 || c.sent()%every != 0 {
		return nil
	}
	conn, ok := c.conn.(interface{ KeyUpdate(requestPeer bool) error })
	if !ok {
		return errors.New("this client cannot send KeyUpdates")
	}
	return conn.KeyUpdate(c.sent()/every%2 == 0)
}

// register notes that a frame is about to be sent and returns its number. It
// comes before the write, so that time spent in a blocked write counts as
// waiting, and so that no echo can overtake it.
func (c *client) register(final bool) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.fleet.now()
	if c.inflight.len() == 0 && c.nextSeq == 0 {
		c.lastEcho = now // gaps between echoes count from the first frame on
	}
	seq := c.nextSeq
	c.nextSeq++
	c.inflight.push(now)
	c.current.FramesSent++
	c.final = final
	return seq
}

// receive checks the echoed stream until it ends.
func (c *client) receive() {
	v := verifier{gen: c.gen, book: c}
	buf := make([]byte, readBuffer)
	for {
		n, err := c.conn.Read(buf)
		if n > 0 {
			if err := v.feed(buf[:n]); err != nil {
				c.wrong(err)
				return
			}
		}
		if err != nil {
			c.readEnded(err)
			return
		}
	}
}

func (c *client) wrong(err error) {
	if e, ok := errors.AsType[*WrongBytesError](err); ok {
		c.mu.Lock()
		if c.outcome == alive {
			c.current.WrongBytes += e.Wrong
		}
		c.mu.Unlock()
	}
	c.end(lost, "wrong bytes", err)
}

func (c *client) readEnded(err error) {
	asked := false
	select {
	case <-c.drained:
		asked = true
	default:
	}
	closeNotify := errors.Is(err, io.EOF) && !c.raw.sawEOF.Load()
	switch {
	case asked && closeNotify:
		c.end(clean, "", nil)
	case asked && errors.Is(err, io.EOF):
		c.end(unclean, "end without close_notify", err)
	case asked:
		c.end(unclean, "end: "+reason(err), err)
	case closeNotify:
		c.end(lost, "closed by the service with close_notify", err)
	case errors.Is(err, io.EOF):
		c.end(lost, "closed by the service without close_notify", err)
	default:
		c.end(lost, reason(err), err)
	}
}

// end settles the session's outcome, the first call wins, and closes the
// connection, which ends both goroutines.
func (c *client) end(how outcome, why string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.outcome != alive {
		return
	}
	c.outcome, c.why, c.endedIn = how, why, c.phase
	if how != clean {
		c.detail = fmt.Sprintf("client %d (%s): %s, %d frames sent, %d waiting",
			c.index, c.raw.LocalAddr(), why, c.nextSeq, c.inflight.len())
		if err != nil && reason(err) != why {
			c.detail += ": " + err.Error()
		}
		c.observeStall(c.oldestAge(c.fleet.now()))
	}
	c.raw.Close()
	close(c.gone)
}

// cutOff ends the session now; the echoes that were still missing decide
// whether it is lost.
func (c *client) cutOff(why string) {
	c.mu.Lock()
	waiting := c.inflight.len()
	c.mu.Unlock()
	if waiting > 0 {
		c.end(lost, why+" while an echo was missing", nil)
	} else {
		c.end(unclean, why+" before close_notify came back", nil)
	}
}

// check ends the session if nothing has come for limit although something
// should have.
func (c *client) check(now, limit time.Duration) {
	c.mu.Lock()
	var silent, closing bool
	if c.inflight.len() > 0 {
		silent = now-max(c.inflight.oldest(), c.lastEcho) > limit
	} else if c.drainedAt > 0 {
		closing = now-c.drainedAt > limit
	}
	c.mu.Unlock()
	if silent {
		c.end(lost, fmt.Sprintf("no echo for %v", limit), nil)
	} else if closing {
		c.end(unclean, fmt.Sprintf("no close_notify for %v", limit), nil)
	}
}

// The four methods of book; the verifier calls them from receive.

func (c *client) sent() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nextSeq
}

// mayLose: a crash can only take frames that were on their way before the
// phase of the crash was over. first has not come back since, so it was on its
// way then if it was sent by then.
func (c *client) mayLose(first, last uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lossy {
		return true
	}
	base := c.nextSeq - uint64(c.inflight.len())
	if c.lossyEnd == 0 || first < base || last >= c.nextSeq {
		return false
	}
	return c.inflight.at(int(last-base)) <= c.lossyEnd
}

func (c *client) echoed(_ uint64, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.fleet.now()
	c.observeStall(now - c.inflight.pop())
	c.current.LongestGap = max(c.current.LongestGap, now-c.lastEcho)
	c.lastEcho = now
	c.current.FramesChecked++
	c.current.BytesChecked += int64(bytes)
	if c.final && c.inflight.len() == 0 {
		c.drainedAt = now
		close(c.drained)
	}
}

func (c *client) interrupted(first, last uint64, bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.fleet.now()
	for ; first <= last; first++ {
		c.observeStall(now - c.inflight.pop())
	}
	if c.gapPhases == nil {
		c.gapPhases = make(map[int]int64)
	}
	c.gapPhases[c.lossyIn] += bytes
}

// observeStall and oldestAge are called with mu held.
func (c *client) observeStall(d time.Duration) {
	c.current.LongestStall = max(c.current.LongestStall, d)
	c.worst = max(c.worst, d)
}

func (c *client) oldestAge(now time.Duration) time.Duration {
	if c.inflight.len() == 0 {
		return 0
	}
	return now - c.inflight.oldest()
}

// A watchedConn remembers that the TCP connection came to its end. crypto/tls
// gives io.EOF for a close_notify and for a FIN between two records; only the
// second has read the end of the TCP stream by then.
type watchedConn struct {
	net.Conn
	sawEOF atomic.Bool
}

func (w *watchedConn) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		w.sawEOF.Store(true)
	}
	return n, err
}

// reason shortens an error to what is the same for all clients, so that equal
// reasons can be counted together.
func reason(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}
