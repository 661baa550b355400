package supervise

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// A program that cannot use the ledger finds that out by looking, which needs no lead and
// changes nothing: the supervisor of before goes on.
func TestLedgerOfAnotherVersionIsSeen(t *testing.T) {
	u := newUnit(t)
	if led, err := findLedger(t.Context(), u.store); led != nil || err != nil {
		t.Fatalf("%v, %v, where there is no ledger", led, err)
	}
	led, fd, err := createLedger(4)
	if err != nil {
		t.Fatal(err)
	}
	defer led.close()
	defer sys.CloseAll([]int{fd})
	if err := u.store.Put(t.Context(), keeper.Entry{Key: keeper.Key{Kind: keeper.KindLedger}, FDs: []int{fd}}); err != nil {
		t.Fatal(err)
	}
	before := string(led.mem)
	found, err := findLedger(t.Context(), u.store)
	if err != nil {
		t.Fatal(err)
	}
	found.close()
	if string(led.mem) != before {
		t.Error("looking at the ledger has changed it")
	}
	binary.LittleEndian.PutUint32(led.mem[hdrVersion:], ledgerVersion+1)
	if found, err := findLedger(t.Context(), u.store); found != nil || err == nil || !strings.Contains(err.Error(), "use the program that started the unit") {
		t.Errorf("%v, %v", found, err)
	}
}
