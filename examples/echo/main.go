// Command echo is a worker that sends back every byte it reads:
//
//	ktlsvisor run --listen 127.0.0.1:8443 -- echo
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// echo returns what io.Copy returns: handoff.ErrMoving when the session moves.
func echo(_ context.Context, c *handoff.Conn) error {
	_, err := io.Copy(c, c)
	return err
}

func main() {
	if err := handoff.Serve(context.Background(), handoff.HandlerFunc(echo), handoff.WithRest(time.Second)); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}
