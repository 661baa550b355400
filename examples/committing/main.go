// Committing is an echo that loses nothing and doubles nothing, also when its process is
// killed in the middle of anything:
//
//	ktlsvisor run --listen 127.0.0.1:8443 --self-signed -- committing
//
// It sends back every byte it reads, as echo does, and counts them. What makes it exact is
// that the three things that belong together happen in one step: the input is done with,
// the count goes up, the answer is on its way. After a kill -9 the next process reads again
// what was not committed, with the count as it was then.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// echo never asks whether it is the first, the next after a move, or the next after a
// crash: it goes on from State.
func echo(_ context.Context, c *handoff.Conn) error {
	var count uint64
	if s := c.State(); len(s) == 8 {
		count = binary.BigEndian.Uint64(s)
	}
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err // handoff.ErrMoving, when the session moves
		}
		count += uint64(n)
		if err := c.Commit(n, binary.BigEndian.AppendUint64(nil, count), buf[:n]); err != nil {
			return err
		}
	}
}

func main() {
	err := handoff.Serve(context.Background(), handoff.HandlerFunc(echo), handoff.WithCommit())
	if err != nil {
		fmt.Fprintln(os.Stderr, "committing:", err)
		os.Exit(1)
	}
}
