package ktls

import (
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// The two layers against crypto/tls: a random script of what both ends of a session
// do (writes and reads of all sizes, changes of keys, moves, every kind of end) gives
// the same bytes and the same end whoever the ends are. What crypto/tls cannot do,
// a move or a KeyUpdate of its own accord, changes nothing that anybody may notice,
// and is left out there.
//
// One difference is on purpose: a FIN without close_notify is io.EOF in crypto/tls,
// and ErrTruncated here.

// op is a kind of step.
type op uint8

const (
	opWrite op = iota
	opRead
	opMove
	opKeyUpdate
	opCloseWrite
	opFIN   // TCP's end without close_notify
	opClose // and nothing after it
	opAbort // a reset, and nothing after it
)

// step is what one end does next.
type step struct {
	op    op
	end   int // 0: server, 1: client
	n     int // bytes
	style int // of writing, or the size of reads
	flag  bool
}

func (s step) String() string {
	who := [...]string{"server", "client"}[s.end]
	switch s.op {
	case opWrite:
		return fmt.Sprintf("%s writes %d (%s)", who, s.n, writeStyles[s.style%len(writeStyles)])
	case opRead:
		return fmt.Sprintf("%s reads %d by %d, unread %v", who, s.n, s.readSize(), s.flag)
	case opMove:
		return who + " moves"
	case opKeyUpdate:
		return fmt.Sprintf("%s KeyUpdate(%v)", who, s.flag)
	}
	return who + [...]string{opCloseWrite: " CloseWrite", opFIN: " FIN", opClose: " Close", opAbort: " aborts"}[s.op]
}

// Ways to write: all the same to the peer.
var writeStyles = [...]string{"plain", "queued and flushed", "queued, moved, flushed", "in pieces", "impatient", "impatient, moving"}

func (s step) readSize() int { return []int{1, 7, 1000, 16 << 10, 64 << 10}[s.style%5] }

func genSteps(t *rapid.T) []step {
	size := rapid.OneOf(rapid.IntRange(0, 40), rapid.IntRange(0, 5000), rapid.SampledFrom([]int{maxPlaintext - 1, maxPlaintext, maxPlaintext + 1, 4 * maxPlaintext}), rapid.IntRange(0, maxWrite()))
	ops := []op{opWrite, opWrite, opWrite, opRead, opRead, opRead, opMove, opMove, opKeyUpdate, opKeyUpdate, opCloseWrite, opFIN, opClose, opAbort}
	one := rapid.Custom(func(t *rapid.T) step {
		return step{
			op:    rapid.SampledFrom(ops).Draw(t, "op"),
			end:   rapid.IntRange(0, 1).Draw(t, "end"),
			n:     size.Draw(t, "n"),
			style: rapid.IntRange(0, 29).Draw(t, "style"),
			flag:  rapid.Bool().Draw(t, "flag"),
		}
	})
	// Ends cut a script short, so most have none before their last steps.
	quiet := rapid.SliceOfN(one.Filter(func(s step) bool { return s.op < opCloseWrite }), 0, 15).Draw(t, "steps")
	return append(quiet, rapid.SliceOfN(one, 0, 8).Draw(t, "last steps")...)
}

func maxWrite() int {
	if guest.InGuest() {
		return 20_000 // emulated crypto is slow
	}
	return 70_000
}

// pairing is who the ends of a session are: "" is crypto/tls.
type pairing struct {
	server, client string
	version, suite uint16
	small          bool // socket buffers
}

func (p pairing) String() string {
	name := func(who string) string {
		if who == stock {
			return "crypto/tls"
		}
		return who
	}
	return fmt.Sprintf("%s serves %s, %s, small buffers: %v", name(p.server), name(p.client), suiteTestName(p.version, p.suite), p.small)
}

const (
	stock  = ""
	soft   = "software"
	kernel = "kernel"
)

func genPairing(t *rapid.T) pairing {
	pairs := [][2]string{{soft, stock}, {stock, soft}, {soft, soft}}
	if guest.InGuest() {
		pairs = [][2]string{{kernel, stock}, {stock, kernel}, {kernel, soft}, {soft, kernel}, {kernel, kernel}}
	}
	who := rapid.SampledFrom(pairs).Draw(t, "pair")
	sc := rapid.SampledFrom(testSuites).Draw(t, "suite")
	p := pairing{who[0], who[1], sc.version, sc.suite, rapid.Bool().Draw(t, "small buffers")}
	if p.version == tls.VersionTLS13 && (p.server == stock || p.client == stock) {
		p.suite = gcm // crypto/tls chooses by itself, this one
	}
	return p
}

// streams are what the ends write.
var streams = func() (s [2][]byte) {
	for e := range s {
		rnd := rand.New(rand.NewPCG(uint64(e), 7)) //nolint:gosec // test data
		s[e] = make([]byte, 4<<20)
		for i := range s[e] {
			s[e][i] = byte(rnd.Uint32())
		}
	}
	return s
}()

// propertyTime bounds the test: what has not been tried by then is left for another
// day. With -rapid.checks there is no such bound.
func propertyTime(t *testing.T) time.Duration {
	set := map[string]string{"rapid.nofailfile": "true", "rapid.shrinktime": "10s", "rapid.checks": "3000"}
	limit := 5 * time.Second
	if guest.InGuest() {
		set["rapid.checks"] = "200"
		limit = 6 * time.Second
	}
	flag.Visit(func(f *flag.Flag) {
		delete(set, f.Name)
		if f.Name == "rapid.checks" {
			limit = time.Hour
		}
	})
	for name, value := range set {
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	return limit
}

func TestSameAsCryptoTLS(t *testing.T) {
	if guest.InGuest() {
		guest.NeedKernelTLS(t)
	}
	over := time.Now().Add(propertyTime(t))
	var failed atomic.Bool // then time is no object: the script is made smaller
	runs := 0
	rapid.Check(t, func(rt *rapid.T) {
		p, script := genPairing(rt), genSteps(rt)
		if !failed.Load() && time.Now().After(over) {
			return
		}
		runs++
		mixed := p.server == stock || p.client == stock
		if p.version != tls.VersionTLS13 || (p.server == kernel || p.client == kernel) && !KeyChanging() {
			script = slices.DeleteFunc(script, func(s step) bool { return s.op == opKeyUpdate })
		}
		got := play(t, p, script, mixed)
		reference := got
		if !guest.InGuest() { // where it would be the same again, slowly
			reference = play(t, pairing{version: p.version, suite: p.suite, small: p.small}, script, mixed)
		}
		if got.err != nil {
			failed.Store(true)
			rt.Fatalf("%v: %v\nafter:\n%s", p, got.err, got.steps)
		}
		if reference.err != nil {
			failed.Store(true)
			rt.Fatalf("crypto/tls at both ends: %v\n%s", reference.err, got.steps)
		}
		for e := range got.ends {
			if a, b := reference.ends[e], got.ends[e]; a != b {
				failed.Store(true)
				rt.Fatalf("%v: end %d saw %+v, with crypto/tls at both ends %+v\nafter:\n%s", p, e, b, a, got.steps)
			}
		}
	})
	t.Logf("%d scripts", runs)
	if runs < 3 {
		t.Errorf("only %d scripts in the time there was", runs)
	}
}

// played is the outcome of a script.
type played struct {
	ends  [2]seen
	err   error
	steps string // that were taken
}

// seen is what one end has seen of the other.
type seen struct {
	bytes int // all of them the right ones
	end   end
}

// end is how the other end's stream ended.
type end string

const (
	endClean     end = "close_notify"
	endTruncated end = "FIN without close_notify"
	endReset     end = "reset"
)

// play runs a script with the ends that p says. What is impossible by then is left
// out, by a model that knows nothing of who the ends are.
func play(t *testing.T, p pairing, script []step, mixed bool) (out played) {
	ends, err := connectPair(t, p)
	if err != nil {
		out.err = err
		return out
	}
	m := &model{ends: ends, mixed: mixed}
	defer m.stop()
	var log bytes.Buffer
	for _, s := range script {
		if m.over {
			break
		}
		if !m.possible(&s) {
			continue
		}
		fmt.Fprintln(&log, " ", s)
		if err := m.take(s); err != nil {
			out.err, out.steps = fmt.Errorf("%v: %w", s, err), log.String()
			return out
		}
	}
	out.steps = log.String()
	out.err = m.finish()
	out.ends = m.seen
	return out
}

// model knows what must have happened, and with that what can happen next.
type model struct {
	ends    [2]peerEnd
	mixed   bool   // one end under test is crypto/tls
	sent    [2]int // bytes written
	seen    [2]seen
	ended   [2]end // how this end's stream ends; "": not yet
	updates [2]int
	gone    [2]bool // closed or aborted
	over    bool
}

// inFlight is how much the end e has yet to read.
func (m *model) inFlight(e int) int { return m.sent[1-e] - m.seen[e].bytes }

// possible adapts s to the state of things.
func (m *model) possible(s *step) bool {
	switch s.op {
	case opWrite:
		return m.ended[s.end] == "" && m.sent[s.end]+s.n <= len(streams[0])
	case opRead:
		s.n = min(s.n, m.inFlight(s.end))
		return s.n > 0 || m.inFlight(s.end) == 0 && m.ended[1-s.end] != ""
	case opKeyUpdate:
		// crypto/tls takes 16 records without data in a row, and answers are some.
		m.updates[s.end]++
		return m.ended[s.end] == "" && m.updates[s.end] < 7
	case opCloseWrite, opFIN:
		return m.ended[s.end] == ""
	}
	return true
}

// slack is how many bytes may be under way without anybody reading: what every
// socket takes.
const slack = 16 << 10

func (m *model) take(s step) error {
	e := m.ends[s.end]
	switch s.op {
	case opWrite:
		return m.write(s)
	case opRead:
		if err := m.read(s.end, s.n, s.readSize(), s.flag); err != nil {
			return err
		}
		if s.n == 0 {
			return m.readEnd(s.end)
		}
	case opMove:
		if m.seen[s.end].end == endReset {
			return nil // there is nothing to move any more
		}
		return e.move()
	case opKeyUpdate:
		return m.keyUpdate(s)
	case opCloseWrite:
		m.ended[s.end] = endClean
		return e.closeWrite()
	case opFIN:
		// The kernel layer may hold a record that a shutdown from outside drops.
		if err := m.readAll(1 - s.end); err != nil {
			return err
		}
		m.ended[s.end] = endTruncated
		return e.fin()
	case opClose, opAbort:
		// Close with input unread is a reset, which can overtake what was written.
		for i := range m.ends {
			if err := m.readAll(i); err != nil {
				return err
			}
		}
		m.over, m.gone[s.end] = true, true
		m.seen[s.end].end = m.ended[1-s.end]
		if m.ended[s.end] != "" {
			if err := m.readEnd(1 - s.end); err != nil { // before there is more
				return err
			}
			_ = e.closeAll(s.op == opAbort) // after FIN it cannot say goodbye
			return nil
		}
		m.ended[s.end] = endClean
		if s.op == opAbort {
			m.ended[s.end] = endReset
		}
		return e.closeAll(s.op == opAbort)
	}
	return nil
}

// keyUpdate keeps clear of a fault of crypto/tls: when it has sent close_notify and
// then meets a KeyUpdate that asks for one, it cannot answer and does not go on to
// the next receiving key either.
func (m *model) keyUpdate(s step) error {
	request := s.flag && !(m.mixed && m.ended[1-s.end] != "")
	if err := m.ends[s.end].keyUpdate(request); err != nil || !request || !m.mixed {
		return err
	}
	if err := m.write(step{end: s.end, n: 1}); err != nil { // for it to read, and answer
		return err
	}
	return m.readAll(1 - s.end)
}

// write writes while the other end reads as much as is needed for it.
func (m *model) write(s step) error {
	to := 1 - s.end
	p := streams[s.end][m.sent[s.end] : m.sent[s.end]+s.n]
	m.sent[s.end] += s.n
	done := make(chan error, 1)
	go func() { done <- m.ends[s.end].write(p, s.style%len(writeStyles)) }()
	var rerr error
	if n := m.inFlight(to) - slack; n > 0 {
		rerr = m.read(to, n, 16<<10, false)
	}
	if rerr != nil {
		m.ends[to].discard() // or the writer would wait
		<-done
		return fmt.Errorf("the other end: %w", rerr)
	}
	return <-done
}

// read reads n bytes at the end e; with unread set, some of them twice.
func (m *model) read(e, n, size int, unread bool) error {
	buf := make([]byte, min(size, max(n, 1)))
	for n > 0 {
		k, err := m.ends[e].read(buf[:min(len(buf), n)])
		at := m.seen[e].bytes
		if !bytes.Equal(buf[:k], streams[1-e][at:at+k]) {
			return fmt.Errorf("wrong bytes: %d read at %d", k, at)
		}
		if err != nil && !(k == n && m.ends[e].stock()) { // which may give the end with the last bytes
			return fmt.Errorf("read at %d, %d to come: %w", at+k, n-k, err)
		}
		if unread && k > 1 {
			k -= m.ends[e].unread(buf[k/2 : k])
		}
		m.seen[e].bytes += k
		n -= k
	}
	return nil
}

func (m *model) readAll(e int) error { return m.read(e, m.inFlight(e), 16<<10, false) }

// readEnd reads the end of the stream, behind its last byte.
func (m *model) readEnd(e int) error {
	if m.gone[e] {
		return nil
	}
	want := m.ended[1-e]
	n, err := m.ends[e].read(make([]byte, 10))
	got, known := endOf(err)
	if m.gone[1-e] && want == endClean && got == endReset {
		got = endClean // what the other end had not read, an answer or a ticket, resets
	}
	if m.ends[e].stock() && want == endTruncated && got == endClean {
		got = endTruncated // crypto/tls makes no difference
	}
	if n != 0 || !known || got != want {
		return fmt.Errorf("end %d: the stream ended with %d bytes and %v, expected %s", e, n, err, want)
	}
	m.seen[e].end = got
	return nil
}

// finish brings every stream to its end.
func (m *model) finish() error {
	for e := range m.ends {
		if m.ended[e] == "" && !m.over {
			m.ended[e] = endClean
			if err := m.ends[e].closeWrite(); err != nil {
				return fmt.Errorf("end %d: CloseWrite at last: %w", e, err)
			}
		}
	}
	for e := range m.ends {
		if m.gone[e] || m.ended[1-e] == "" {
			continue
		}
		if err := m.readAll(e); err != nil {
			return fmt.Errorf("end %d: the rest: %w", e, err)
		}
		for range 2 { // an end lasts
			if err := m.readEnd(e); err != nil {
				return err
			}
			if m.ended[1-e] == endReset || m.gone[1-e] {
				break
			}
		}
	}
	return nil
}

func (m *model) stop() {
	for _, e := range m.ends {
		e.discard()
	}
}
