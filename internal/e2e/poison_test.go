package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

func init() { roles["poisonable"] = poisonable }

// venom is what a poisonable worker does not survive.
const venom = "a message that no worker survives\n"

// poisonable is an echo worker that dies of one message.
func poisonable() int {
	return exitOf(handoff.Serve(context.Background(), handoff.HandlerFunc(func(_ context.Context, c *handoff.Conn) error {
		buf := make([]byte, 4096)
		for {
			n, err := c.Read(buf)
			if bytes.Contains(buf[:n], []byte(venom)) {
				_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
				select {}
			}
			if _, werr := c.Write(buf[:n]); werr != nil {
				return werr
			}
			if err != nil {
				return err
			}
		}
	})))
}

// A client whose message kills workers takes one of them down, then the quarantine
// worker, and is closed; all others live on, and are in no worker that dies twice.
func TestKernelLayerPoisonIsQuarantinedAndClosed(t *testing.T) {
	guest.NeedKernelTLS(t)
	poison(t, "kernel")
}

func TestHostPoisonIsQuarantinedAndClosed(t *testing.T) { poison(t, "software") }

func poison(t *testing.T, layer string) {
	const clients = 200
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "poisonable")}, "", "offload = \""+layer+"\"")}})
	f := u.fleet(clients)
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", u.Addr, insecure())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	u.settled(clients + 1)
	f.Phase("first crash", true)
	if _, err := io.WriteString(c, venom); err != nil {
		t.Fatal(err)
	}
	st := u.await("quarantine", func(st *admin.Status) bool {
		q := st.Pools[0].Quarantine
		return q != nil && q.Sessions >= 1 && visor.Settled(st) && st.Sessions.Total == clients+1 && len(st.Pools[0].Workers) == 2
	})
	f.advance()
	before := visor.WorkerPIDs(st)
	f.Phase("second crash", true)
	if _, err := io.WriteString(c, venom); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("the poison session got an answer")
	}
	st = u.await("its end", func(st *admin.Status) bool {
		return visor.Settled(st) && st.Sessions.Total == clients && st.Reasons["poison"] == 1
	})
	if after := visor.WorkerPIDs(st); len(after) != 2 || after[0] != before[0] || after[1] != before[1] {
		t.Errorf("workers %v, then %v: the second crash was not that of the quarantine worker alone", before, after)
	}
	if n := st.Counters.Lost; n != 0 {
		t.Errorf("%d sessions were lost", n)
	}
	f.advance()
	if err := f.stop().Err(); err != nil {
		t.Error(err)
	}
}
