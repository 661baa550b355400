package handoffhttp_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"
)

// Requests that are written in pieces of any size, many behind each other, while one
// process after the other takes over: each is answered once, in order, with its own body.
func TestRandomRequestsOverUpgrades(t *testing.T) {
	t.Parallel()
	p := start(t, "http/1.1")
	seed := rand.Uint64()
	t.Log("seed ", seed)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		c := p.dial()
		bodies := make(chan []byte, 1000)
		wg.Go(func() { // the client's writing
			defer close(bodies)
			for n := 0; n < 900; n++ {
				select {
				case <-stop:
					return
				default:
				}
				body := make([]byte, rnd.IntN(1+rnd.IntN(6000)))
				for j := range body {
					body[j] = byte(rnd.Uint32())
				}
				var req bytes.Buffer
				if rnd.IntN(2) == 0 {
					fmt.Fprintf(&req, "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				} else {
					fmt.Fprintf(&req, "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
					if len(body) > 0 {
						fmt.Fprintf(&req, "%x\r\n%s\r\n", len(body), body)
					}
					req.WriteString("0\r\n\r\n")
				}
				bodies <- body
				for first := true; req.Len() > 0; first = false {
					piece := req.Next(1 + rnd.IntN(1+rnd.IntN(req.Len())))
					if first && rnd.IntN(2) == 0 { // what net/http reads while it waits for a request
						if _, err := c.Write(piece[:1]); err != nil {
							t.Error(err)
							return
						}
						time.Sleep(time.Duration(rnd.IntN(30)) * time.Millisecond)
						if piece = piece[1:]; len(piece) == 0 {
							continue
						}
					}
					if _, err := c.Write(piece); err != nil {
						t.Error(err)
						return
					}
					if rnd.IntN(3) == 0 {
						time.Sleep(time.Duration(rnd.IntN(10)) * time.Millisecond)
					}
				}
			}
		})
		wg.Go(func() { // and its reading
			n := 0
			for want := range bodies {
				resp, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Errorf("connection %d, answer %d: %v", i, n, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(got, want) {
					t.Errorf("connection %d, answer %d: status %d, %d bytes, error %v; want the %d bytes of the request", i, n, resp.StatusCode, len(got), err, len(want))
					return
				}
				n++
			}
			t.Logf("connection %d: %d requests", i, n)
		})
	}
	for range 8 {
		old, _ := p.upgrade()
		p.ended(old)
	}
	close(stop)
	wg.Wait()
}
