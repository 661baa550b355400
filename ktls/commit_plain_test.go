package ktls

import (
	"os"
	"path/filepath"
	"testing"
)

// takesAll is a layer that sends files and pipes, in name.
type takesAll struct{}

func (takesAll) prepareFile() error                             { return nil }
func (takesAll) sendFile(_ uintptr, count int) (int, error)     { return count, nil }
func (takesAll) splices() bool                                  { return true }
func (takesAll) sendPipe(_ uintptr, n int) (int, uint64, error) { return n, 1, nil }

// Output beside Commit makes a session inexact after a crash, whichever way it went out,
// and for as long as it is nowhere but in this process.
func TestOutputBesideCommit(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for name, write := range map[string]func(t *testing.T, c *Conn){
		"nothing":  func(*testing.T, *Conn) {},
		"Write":    func(t *testing.T, c *Conn) { must(t)(c.Write([]byte("some"))) },
		"sendfile": func(t *testing.T, c *Conn) { must(t)(c.sendFile(takesAll{}, file, file.Fd(), 4)) },
		"splice":   func(t *testing.T, c *Conn) { must(t)(c.splicePipe(takesAll{}, 0, 4)) },
		"queued": func(t *testing.T, c *Conn) {
			if err := c.QueueWrite([]byte("some")); err != nil {
				t.Fatal(err)
			}
			// In the kernel layer there is no journal that has it.
			soft := c.layer
			c.layer = &kernelLayer{}
			defer func() { c.layer = soft }()
			if done, err := c.Commit(0, nil, []byte("committed"), false); !done || err != nil {
				t.Fatal(done, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ta := newTestArenaOf(t, 1<<20, 4)
			c, _ := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, testClientTLS(t))
			key := JournalKey{7, 9}
			if _, err := ta.a.NewCommits(c, key, nil, false); err != nil {
				t.Fatal(err)
			}
			record := (&record{V: recordVersion, ID: c.facts.ID, Layer: LayerKernel}).encode(nil)
			exact := func() bool {
				t.Helper()
				l, err := OpenCommits(ta.mem)
				if err != nil {
					t.Fatal(err)
				}
				got, err := l.Amend(key, record, nil)
				if got == nil || err != nil {
					t.Fatal(got, err)
				}
				return got.Exact
			}
			write(t, c)
			if got, want := exact(), name == "nothing"; got != want {
				t.Errorf("exact: %v, want %v", got, want)
			}
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
			if done, err := c.Commit(0, nil, nil, true); !done || err != nil {
				t.Fatal(done, err)
			}
			if !exact() {
				t.Error("not exact after the next Commit, when all of it had left")
			}
		})
	}
}

func must(t *testing.T) func(int, error) {
	return func(_ int, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}
