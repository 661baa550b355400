package load

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func duration(i int) time.Duration { return time.Duration(i) }

func TestHonestService(t *testing.T) {
	for _, version := range []uint16{0, tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			var progress []int
			f := start(t, startServer(t, nil), func(o *Options) {
				o.Version, o.Sessions = version, 20
				o.Progress = func(done, total int) { progress = append(progress, done*100+total) }
			})
			for i, p := range progress {
				if p != (i+1)*100+20 {
					t.Fatalf("progress %v", progress)
				}
			}
			until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 500 })
			f.Phase("more", false)
			until(t, f, "echoing", func(r Report) bool { return r.Phases[1].FramesChecked > 500 })
			r := stop(t, f)
			if err := r.Err(); err != nil {
				t.Error(err)
			}
			if len(progress) != 20 || r.Alive != 20 || r.Interrupted != 0 || r.BytesChecked < 36*r.FramesChecked {
				t.Errorf("report %+v", r)
			}
			if r.FramesChecked != r.FramesSent || r.Phases[0].FramesChecked+r.Phases[1].FramesChecked != r.FramesChecked {
				t.Errorf("%d frames sent, %d checked, phases %+v", r.FramesSent, r.FramesChecked, r.Phases)
			}
		})
	}
}

// A large frame spans many records and reads.
func TestLargeFrames(t *testing.T) {
	f := start(t, startServer(t, nil), func(o *Options) { o.MinPayload, o.MaxPayload = 60_000, 90_000 })
	until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 20 })
	if err := stop(t, f).Err(); err != nil {
		t.Error(err)
	}
}

// at edits the byte at one offset of the stream.
func at(offset int, edit func(p []byte, i int) []byte) func(*serverConn, int, []byte) ([]byte, error) {
	return func(_ *serverConn, at int, p []byte) ([]byte, error) {
		if i := offset - at; i >= 0 && i < len(p) {
			return edit(p, i), nil
		}
		return p, nil
	}
}

var errEnd = errors.New("end of this connection")

// Whatever a broken or hostile service does, every session must be counted as
// lost, for the right reason. The same must be seen in a phase that may
// interrupt, for none of it is what a crash does.
func TestFaults(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(*serverConn, int, []byte) ([]byte, error)
		reason string
		bytes  bool // WrongBytes are counted
	}{
		{"flips a bit", at(3000, func(p []byte, i int) []byte { p[i] ^= 4; return p }), "wrong bytes", true},
		{"doubles a byte", at(3000, func(p []byte, i int) []byte {
			return append(append(append([]byte{}, p[:i+1]...), p[i]+1), p[i+1:]...)
		}), "wrong bytes", true},
		{"doubles what it read", at(3000, func(p []byte, i int) []byte { return append(p, p...) }), "wrong bytes", true},
		{"talks unasked", at(3000, func(p []byte, i int) []byte { return append(p, make([]byte, 100_000)...) }), "wrong bytes", true},
		{"falls silent", func(_ *serverConn, at int, p []byte) ([]byte, error) {
			if at > 3000 {
				return nil, nil
			}
			return p, nil
		}, "no echo for 300ms", false},
		{"closes with close_notify", func(c *serverConn, at int, p []byte) ([]byte, error) {
			if at > 3000 {
				c.CloseWrite()
				io.Copy(io.Discard, c)
				return nil, errEnd
			}
			return p, nil
		}, "closed by the service with close_notify", false},
		{"sends FIN only", func(c *serverConn, at int, p []byte) ([]byte, error) {
			if at > 3000 {
				c.tcp.CloseWrite()
				io.Copy(io.Discard, c.tcp)
				return nil, errEnd
			}
			return p, nil
		}, "closed by the service without close_notify", false},
		{"resets", func(c *serverConn, at int, p []byte) ([]byte, error) {
			if at > 3000 {
				c.tcp.SetLinger(0)
				return nil, errEnd
			}
			return p, nil
		}, "connection reset by peer", false},
	}
	for _, tt := range tests {
		for _, mayInterrupt := range []bool{false, true} {
			name := tt.name
			if mayInterrupt {
				name += " in a crash"
			}
			t.Run(name, func(t *testing.T) {
				f := start(t, startServer(t, func(s *server) { s.spoil = tt.spoil }), func(o *Options) {
					o.StallLimit = 300 * time.Millisecond
					o.Sessions = 3
				})
				f.Phase("fault", mayInterrupt)
				r := until(t, f, "all lost", func(r Report) bool { return r.Lost == 3 })
				for got := range r.LostReasons {
					if !strings.HasSuffix(got, tt.reason) {
						t.Errorf("lost for %q, want %q; %v", got, tt.reason, r.Examples)
					}
				}
				if tt.bytes != (r.WrongBytes > 0) || r.Interrupted != 0 || r.Alive != 0 {
					t.Errorf("report %+v", r)
				}
				if r := stop(t, f); r.Err() == nil || r.Lost != 3 || r.Unclean != 0 || len(r.Examples) != 3 {
					t.Errorf("after the stop: %+v", r)
				}
			})
		}
	}
}

// A dropped byte is wrong, unless a crash is allowed to take it.
func TestDrop(t *testing.T) {
	for _, n := range []int64{1, 5, 100, 3000} {
		s := startServer(t, nil)
		f := start(t, s, nil)
		until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 100 })
		s.swallow.Add(n)
		r := until(t, f, "lost", func(r Report) bool { return r.Lost == 5 })
		if r.Err() == nil || r.WrongBytes < 5 || r.Interrupted != 0 {
			t.Errorf("%d bytes dropped: %+v", n, r)
		}
	}
}

// A gap in a phase that allows it is an interruption of every session, with
// the exact number of missing bytes; the sessions live on, and the next phase
// is strict again.
func TestCrash(t *testing.T) {
	for _, n := range []int64{1, 100, 3000} {
		s := startServer(t, nil)
		f := start(t, s, nil)
		until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 100 })
		f.Phase("crash", true)
		s.swallow.Add(n)
		until(t, f, "interrupted", func(r Report) bool { return r.Interrupted == 5 })
		f.Phase("after", false)
		before := until(t, f, "echoing again", func(r Report) bool { return r.Phases[2].FramesChecked > 100 })
		if before.Lost != 0 || before.WrongBytes != 0 {
			t.Fatalf("%d bytes taken by a crash: %+v", n, before)
		}
		p := before.Phases[1]
		if p.Interrupted != 5 || p.BytesInterrupted != 5*n || before.BytesInterrupted != 5*n || before.Phases[2].Interrupted != 0 {
			t.Errorf("%d bytes taken by a crash: %+v", n, before)
		}
		s.swallow.Add(n)
		if r := until(t, f, "lost", func(r Report) bool { return r.Lost == 5 }); r.Phases[2].Lost != 5 || r.Phases[2].WrongBytes < 5 {
			t.Errorf("a gap after the phase of the crash: %+v", r)
		}
	}
}

// When a crash takes the end of the stream, the last frame of Stop shows it,
// and the session still ends in order. Here every byte of the second frame is
// taken and no third would follow for an hour.
func TestCrashThenStop(t *testing.T) {
	s := startServer(t, nil)
	f := start(t, s, func(o *Options) { o.Interval = time.Hour })
	for _, c := range f.clients {
		b := c.gen.appendFrame(nil, c.register(false))
		if _, err := c.conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	until(t, f, "echoing", func(r Report) bool { return r.FramesChecked == 5 })
	f.Phase("crash", true)
	s.swallow.Store(1 << 20)
	var taken int64
	for _, c := range f.clients {
		b := c.gen.appendFrame(nil, c.register(false))
		if _, err := c.conn.Write(b); err != nil {
			t.Fatal(err)
		}
		taken += int64(len(b))
	}
	until(t, f, "taken", func(Report) bool { return s.swallowed.Load() == taken })
	f.Phase("after", false)
	s.swallow.Store(0)
	if r := stop(t, f); r.Err() != nil || r.Interrupted != 5 || r.Phases[1].Interrupted != 5 {
		t.Errorf("%+v", r)
	}
}

// Stop does not wait longer than it is told to, and says what was missing.
func TestStopCutShort(t *testing.T) {
	frozen := make(chan struct{})
	defer close(frozen)
	f := start(t, startServer(t, func(s *server) { s.frozen = frozen }), nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r := f.Stop(ctx); r.Lost != 5 || r.LostReasons["stopped while an echo was missing"] != 5 {
		t.Errorf("%+v", r)
	}
}

// A stall is seen as long as it lasts, in the phase in which it lasts.
func TestStall(t *testing.T) {
	frozen := make(chan struct{})
	s := startServer(t, func(s *server) { s.frozen = frozen })
	f := start(t, s, nil)
	f.Phase("frozen", false)
	r := until(t, f, "stalling", func(r Report) bool { return r.Phases[1].StallP99 > 150*time.Millisecond })
	if r.FramesChecked != 0 || r.LongestStall < r.Phases[1].LongestStall || r.Lost != 0 {
		t.Errorf("during the stall: %+v", r)
	}
	f.Phase("thawed", false)
	close(frozen)
	until(t, f, "echoing", func(r Report) bool { return r.Phases[2].FramesChecked > 100 })
	r = stop(t, f)
	if err := r.Err(); err != nil {
		t.Error(err)
	}
	if r.Phases[1].LongestStall < 150*time.Millisecond || r.LongestGap < 150*time.Millisecond || r.StallP99 < 150*time.Millisecond {
		t.Errorf("after the stall: %+v", r)
	}
}

func TestUncleanEnd(t *testing.T) {
	tests := []struct {
		name string
		bye  func(*serverConn)
	}{
		{"FIN only", func(c *serverConn) { c.tcp.CloseWrite() }},
		{"reset", func(c *serverConn) { c.tcp.SetLinger(0) }},
		{"silence", func(c *serverConn) { io.Copy(io.Discard, c.tcp) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, startServer(t, func(s *server) { s.bye = tt.bye }), func(o *Options) { o.StallLimit = 200 * time.Millisecond })
			until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 50 })
			if r := stop(t, f); r.Unclean != 5 || r.Lost != 0 || r.Err() == nil {
				t.Errorf("report %+v", r)
			}
		})
	}
}

func TestBytesAfterTheEnd(t *testing.T) {
	f := start(t, startServer(t, func(s *server) {
		s.bye = func(c *serverConn) { c.Write([]byte("?")); c.Close() }
	}), nil)
	until(t, f, "echoing", func(r Report) bool { return r.FramesChecked > 50 })
	if r := stop(t, f); r.Lost != 5 || r.WrongBytes != 5 {
		t.Errorf("report %+v", r)
	}
}

func TestCancelledFleet(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := startServer(t, nil)
	f, err := Start(ctx, Options{Addr: s.addr, TLS: &tls.Config{RootCAs: s.roots}, Sessions: 3, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	until(t, f, "cut off", func(r Report) bool { return r.Lost+r.Unclean == 3 })
	if r := stop(t, f); r.Err() == nil || r.Lost+r.Unclean != 3 {
		t.Errorf("a fleet that was cut off reports %+v", r)
	}
}

func TestStartErrors(t *testing.T) {
	s := startServer(t, nil)
	good := Options{Addr: s.addr, TLS: &tls.Config{RootCAs: s.roots}, Sessions: 4}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	tests := []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"nobody listens", func(o *Options) { o.Addr = free.Addr().String() }, "connection refused"},
		{"unknown authority", func(o *Options) { o.TLS = &tls.Config{} }, "TLS handshake"},
		{"no port", func(o *Options) { o.Addr = "127.0.0.1" }, "missing port"},
		{"no TLS", func(o *Options) { o.TLS = nil }, "Options.TLS"},
		{"no sessions", func(o *Options) { o.Sessions = 0 }, "at least 1"},
		{"payload", func(o *Options) { o.MinPayload, o.MaxPayload = 10, 5 }, "payload"},
		{"version", func(o *Options) { o.Version = tls.VersionTLS11 }, "version"},
	}
	for _, tt := range tests {
		o := good
		tt.change(&o)
		f, err := Start(t.Context(), o)
		if err == nil {
			stop(t, f)
			t.Errorf("%s: started", tt.name)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %q does not say %q", tt.name, err, tt.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ctx, good); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before the start: %v", err)
	}
}

// Scripts read these names.
func TestReportJSON(t *testing.T) {
	b, err := json.Marshal(Report{Sessions: 1, Phases: []PhaseReport{{Name: "start"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"sessions", "alive", "lost", "unclean", "interrupted", "frames_sent", "frames_checked",
		"bytes_checked", "wrong_bytes", "bytes_interrupted", "longest_stall_ns", "longest_gap_ns", "stall_p99_ns", "client_pause_ns",
		"phases", "name", "may_interrupt", "duration_ns"} {
		if !strings.Contains(string(b), `"`+key+`":`) {
			t.Errorf("%s is missing in %s", key, b)
		}
	}
}
